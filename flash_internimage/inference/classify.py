"""Classify images with a model of timm."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset
from torch import nn

from .results import Classification
from .sources import read_rgb


def classify(
    model: nn.Module | str,
    images: Sequence[str | os.PathLike | np.ndarray | Image.Image],
    top_k: int = 5,
) -> list[Classification]:
    """Return the most probable classes of images, by a model of timm.

    The preprocessing is that of `timm.data.resolve_model_data_config`. The classes are those of
    ImageNet-1K or 22K, or those that the model's pretrained config names, as after loading it from
    the Hugging Face Hub; otherwise they are named `class_0`, `class_1` and so on.

    Args:
        model: Model, or name of one, whose released weights are loaded.
        images: Paths, arrays (H, W, 3) of dtype uint8 in RGB, or images of Pillow.
        top_k: Number of classes per image.

    Raises:
        UnreadableImage: If an image cannot be read.
        ValueError: If `images` is not a sequence of images, or `top_k` is not a number of classes.

    Example::

        model = timm.create_model("flash_internimage_tiny.in1k", pretrained=True).eval()
        [result] = classify(model, ["image.jpg"])
        print(result.names[0], result.scores[0])
    """
    if isinstance(images, str | os.PathLike | Image.Image):
        raise ValueError(f"images must be a list, got a single {type(images).__name__}")
    if isinstance(model, str):
        model = timm.create_model(model, pretrained=True)
    transform = create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    parameter = next(model.parameters())
    pixels = [image if isinstance(image, Image.Image) else _open(image) for image in images]
    inputs = [transform(image.convert("RGB")) for image in pixels]
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            logits = model(torch.stack(inputs).to(parameter.device, parameter.dtype))
    finally:
        model.train(was_training)
    names = class_names(model, logits.shape[1])
    return rank(logits, names, top_k)


def _open(image: str | os.PathLike | np.ndarray) -> Image.Image:
    return Image.fromarray(image if isinstance(image, np.ndarray) else read_rgb(image))


def class_names(model: nn.Module, num_classes: int) -> tuple[str, ...]:
    """Return the class names of a model of timm; see :func:`classify`."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    names = cfg.get("label_names")
    if names and len(names) == num_classes:
        descriptions = cfg.get("label_descriptions") or {}
        return tuple(str(descriptions.get(name, name)) for name in names)
    if subset := infer_imagenet_subset({"num_classes": num_classes}):
        info = ImageNetInfo(subset)
        return tuple(info.index_to_description(i) for i in range(num_classes))
    return tuple(f"class_{i}" for i in range(num_classes))


def rank(logits: torch.Tensor, names: Sequence[str], top_k: int) -> list[Classification]:
    """Return the most probable classes.

    Args:
        logits: (N, classes).
        names: Names of the classes.
        top_k: Number of classes to return.

    Raises:
        ValueError: If `top_k` is not from 1 to the number of classes, or a logit is not finite.
    """
    classes = logits.shape[1]
    if not 1 <= top_k <= classes:
        raise ValueError(f"top_k must be from 1 to {classes}, the number of classes, got {top_k}")
    logits = logits.float().cpu()
    if not logits.isfinite().all():
        raise ValueError("logits must be finite, got NaN or infinity")
    scores, labels = logits.softmax(1).topk(top_k)
    return [
        Classification(s.numpy(), i.numpy(), tuple(names[k] for k in i.tolist()))
        for s, i in zip(scores, labels, strict=True)
    ]
