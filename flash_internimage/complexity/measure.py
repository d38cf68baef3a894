"""Measure the complexity of a model of any task."""

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from numbers import Integral

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..inference.predictor import ModelSource, find_model
from .tracker import Tracker

_MOST = 65_536  # pixels of a side, and images of a batch: products fit in 64 bits

Size = tuple[int, int]


@dataclass(frozen=True)
class Network:
    """A model on the meta device, and how to run it.

    Attributes:
        model: The model.
        size: Default (H, W) of the images.
        predict: Compute the outputs for a batch of images.
        loss: Compute a scalar that depends on all outputs.
        context: Context in which both run.
    """

    model: nn.Module
    size: Size
    predict: Callable[[Tensor], object]
    loss: Callable[[Tensor], Tensor]
    context: Callable[[], AbstractContextManager] = nullcontext


@dataclass(frozen=True, kw_only=True)
class Complexity:
    """The complexity of a model in float32.

    Attributes:
        task: 'classification', 'detection' or 'segmentation'.
        size: (H, W) of the images.
        batch_size: Number of images.
        parameters: Number of parameters.
        multiply_adds: Multiply-adds of a prediction, as `ops_dcnv4.flops` and
            `torch.utils.flop_counter` count them.
        activations: Elements in the outputs of convolutions, matrix products and the operators.
        inference_memory: Peak bytes of a prediction, with parameters and images.
        training_memory: Peak bytes of a training step with AdamW, with gradients and moments.
    """

    task: str
    size: Size
    batch_size: int
    parameters: int
    multiply_adds: int
    activations: int
    inference_memory: int
    training_memory: int


def measure_complexity(
    model: str | os.PathLike | ModelSource, size: Size | None = None, batch_size: int = 1
) -> Complexity:
    """Measure a model on the meta device.

    Detectors and segmentors are measured up to the outputs of their heads: two-stage detectors for
    1000 proposals and 100 masks in each image (512 and 128 in training), without NMS, the
    assignment of targets and DINO's denoising queries. Their training step minimizes the sum of the
    outputs in place of the losses, except for the cross-entropy of UPerNet.

    Args:
        model: Name of a model of the zoo or of timm, or path or name of a config.
        size: (H, W) of the images. Default: the test size for classifiers; 800 x 1280 for
            detectors; the crop size times four crops side by side for segmentors, 512 x 2048 for
            crops of 512, as in the published tables.
        batch_size: Number of images.

    Raises:
        FileNotFoundError: If there is no such config file.
        ValueError: If there is no such model, or images of this size do not fit it.

    Example:
        >>> measure_complexity("flash_internimage_tiny.in1k").multiply_adds
        4868442112
    """
    source = model if isinstance(model, ModelSource) else find_model(model)
    if not _is_count(batch_size):
        raise ValueError(f"batch_size must be at least 1 and at most {_MOST}, got {batch_size!r}")
    if size is not None:
        sides = tuple(size) if isinstance(size, Sequence) else ()
        if len(sides) != 2 or not all(map(_is_count, sides)):
            raise ValueError(f"size must be two numbers (H, W) from 1 to {_MOST}, got {size!r}")
    if source.task == "classification":
        network = _classifier(source)
    else:
        from .openmmlab import build_network

        network = build_network(source)
    height, width = size or network.size
    images = torch.empty(batch_size, 3, height, width, device="meta")
    try:
        inference, training = _predict(network, images), _train(network, images)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"size must fit the model {source.name}, got {height} x {width}: {error}"
        ) from error
    return Complexity(
        task=source.task,
        size=(height, width),
        batch_size=batch_size,
        parameters=sum(p.numel() for p in network.model.parameters()),
        multiply_adds=inference.multiply_adds,
        activations=inference.activations,
        inference_memory=inference.peak_memory,
        training_memory=training.peak_memory,
    )


def _is_count(number: object) -> bool:
    return isinstance(number, Integral) and number is not True and 1 <= int(number) <= _MOST


def _classifier(source: ModelSource) -> Network:
    with torch.device("meta"):
        if source.config is None:
            model = timm.create_model(source.name)
            size = resolve_model_data_config(model)["input_size"][-2:]
        else:
            from ..classification.config import load_config
            from ..classification.model import create_model

            config = load_config(source.config)
            model = create_model(config.model)
            size = (config.data.image_size, config.data.image_size)

    def loss(images: Tensor) -> Tensor:
        logits = model(images)
        return F.cross_entropy(logits, torch.empty(len(images), dtype=torch.long, device="meta"))

    return Network(model, size, model, loss)


def _tensors(model: nn.Module) -> chain[Tensor]:
    return chain(model.parameters(), model.buffers())


def _predict(network: Network, images: Tensor) -> Tracker:
    tracker = Tracker([*_tensors(network.model.eval()), images])
    # Some modules create constants on the default device.
    with torch.device("meta"), torch.no_grad(), tracker, network.context():
        network.predict(images)
    return tracker


def _train(network: Network, images: Tensor) -> Tracker:
    """Take the second of two training steps, which finds the moments of the optimizer."""
    for module in network.model.train().modules():
        if isinstance(module, _BatchNorm):  # It refuses a batch of a single value.
            module.eval()
    trained = [p for p in network.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    moments = [t for state in optimizer.state.values() for t in state.values()]
    tracker = Tracker([*_tensors(network.model), *moments, images])
    with torch.device("meta"), tracker, network.context():
        network.loss(images).backward()
        optimizer.step()
    return tracker
