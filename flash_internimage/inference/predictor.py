"""Load a model of any task for prediction."""

import difflib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path, PurePath
from typing import Any, ClassVar

import numpy as np
import timm
from torch import nn

from ..checkpoints.zoo import TASKS, Entry, Task, read_zoo
from ..configs import find_config, list_configs
from ..images import check_rgb

_YAML = (".yaml", ".yml")
# Prefixes of models outside of timm's registry.
_OF_TIMM = ("hf-hub:", "hf_hub:", "local-dir:")
# Mixed-precision modes by the dtype of a predictor.
_AMP = {"float32": "off", "float16": "fp16", "bfloat16": "bf16"}


class Predictor(ABC):
    """A model with its preprocessing and class names; there is one subclass per task.

    Attributes:
        task: 'classification', 'detection' or 'segmentation'.
        classes: Names of the classes, in the order of the labels.
        model: The model, in evaluation mode and on its device.
        steps: The transforms of its preprocessing, of torchvision or OpenMMLab, in order.
    """

    task: ClassVar[Task]
    classes: tuple[str, ...]
    model: nn.Module
    steps: Sequence[Any]

    @abstractmethod
    def __call__(self, images: Sequence[np.ndarray]) -> list[Any]:
        """Predict images.

        Args:
            images: Arrays (H, W, 3) of dtype uint8 in RGB, of any sizes.

        Returns:
            For each image a :class:`Classification`, :class:`Detections` or :class:`LabelMap`.

        Raises:
            ValueError: If an image is anything else, or the outputs of the model are not finite.
        """


@dataclass(frozen=True)
class ModelSource:
    """What the name of a model refers to.

    Attributes:
        name: The name.
        task: Task of the model.
        config: Path of the config; None for models of timm.
        entry: Entry of the zoo with the released weights, if any.
    """

    name: str
    task: Task
    config: Path | None = None
    entry: Entry | None = None


def find_model(model: str | os.PathLike) -> ModelSource:
    """Find a model by its name in the zoo or timm, or by its config.

    Args:
        model: See :func:`load_predictor`.

    Raises:
        FileNotFoundError: If there is no such config file.
        ValueError: If there is no such model or the config cannot be read.
    """
    if not isinstance(model, (str, os.PathLike)):
        given = type(model).__name__
        raise ValueError(f"model must be the name of a model or the path of a config, got {given}")
    name, zoo = os.fspath(model), read_zoo()
    if name.startswith(_OF_TIMM) or timm.is_model(name):
        _check_tag(name)
        return ModelSource(name, "classification", None, zoo.get(name))
    if entry := zoo.get(name):
        return ModelSource(name, entry.task, entry.config_path, entry)
    try:
        config = find_config(name)
    except FileNotFoundError:
        if name.endswith((".py", *_YAML)):
            raise
        known = [*zoo, *timm.list_models(["flash_internimage*", "internimage*"])]
        known += [PurePath(path).stem for path in list_configs()]
        close = difflib.get_close_matches(name, dict.fromkeys(known), n=2, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(
            f"model must be a name of the zoo or of timm, or a config, got '{name}'{hint}"
        ) from None
    if config.suffix not in (".py", *_YAML):
        raise ValueError(f"config must end in .py, .yaml or .yml, got {name}")
    entries = (entry for entry in zoo.values() if entry.config)
    released = next((e for e in entries if config.samefile(e.config_path)), None)
    task = "classification" if config.suffix in _YAML else _task_of(config)
    return ModelSource(name, task, config, released)


def _check_tag(name: str) -> None:
    """Check the tag of a model of timm, such as `in1k`."""
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        known = timm.list_models(f"{name.split('.')[0]}.*", pretrained=True)
        raise ValueError(
            f"model must be {' or '.join(known) or name.split('.')[0]}, got '{name}'"
        ) from error


def _task_of(config: Path) -> Task:
    """Return the task of a config of mmdet or mmseg."""
    from ..openmmlab.cli.config import read_config

    scope = read_config(config, import_custom_modules=False).get("default_scope")
    if scope not in TASKS:
        raise ValueError(
            f"default_scope of {config} must be {' or '.join(map(repr, TASKS))}, got {scope!r}"
        )
    return TASKS[scope]


def load_predictor(
    model: str | os.PathLike | ModelSource,
    checkpoint: str | os.PathLike | None = None,
    *,
    device: str = "auto",
    dtype: str = "float32",
    top_k: int = 5,
    score_threshold: float = 0.3,
    tta: bool = False,
) -> Predictor:
    """Load a model of any task for prediction.

    Class names and, for classifiers, the preprocessing are those in the checkpoint if it has any,
    otherwise those of the config or of timm.

    Args:
        model: Name of a model of the zoo or of timm (also `hf-hub:USER/NAME`), or path or name of a
            config: `*.py` of mmdet or mmseg, `*.yaml` of `classification.train`.
        checkpoint: Path, URL or name of the weights; None for the released weights.
        device: 'auto', which selects the accelerator if there is one, 'cpu', 'cuda', 'cuda:1', ...
        dtype: 'float32', or 'float16' or 'bfloat16' for mixed precision.
        top_k: Number of classes that a classifier returns, at most.
        score_threshold: Minimum score of the objects that a detector returns.
        tta: Average the predictions of a segmentor over scales and flips, as its config defines.

    Raises:
        FileNotFoundError: If the config or checkpoint does not exist.
        ValueError: If an argument cannot be used, or the checkpoint does not match the model.
        OSError: If a download fails.

    Example::

        predictor = load_predictor("mask_rcnn_flash_internimage_t_fpn_1x_coco")
        [result] = predictor([read_rgb("image.jpg")])
        print([result.classes[label] for label in result.labels], result.boxes)
    """
    if dtype not in _AMP:
        raise ValueError(f"dtype must be one of {', '.join(map(repr, _AMP))}, got {dtype!r}")
    if not (isinstance(top_k, Integral) and top_k >= 1):
        raise ValueError(f"top_k must be at least 1, got {top_k!r}")
    if not (isinstance(score_threshold, Real) and 0 <= score_threshold <= 1):
        raise ValueError(f"score_threshold must be from 0 to 1, got {score_threshold!r}")
    source = model if isinstance(model, ModelSource) else find_model(model)
    if tta and source.task != "segmentation":
        raise ValueError(f"tta must be used with a segmentor, got {source.name} ({source.task})")
    if source.task == "classification":
        from .classifier import load_classifier

        return load_classifier(source, checkpoint, device, _AMP[dtype], top_k)
    if source.task == "detection":
        from .detector import load_detector

        return load_detector(source, checkpoint, device, _AMP[dtype], score_threshold)
    from .segmentor import load_segmentor

    return load_segmentor(source, checkpoint, device, _AMP[dtype], tta)


def check_images(images: Sequence[np.ndarray]) -> None:
    """Check the types and shapes of images, as :func:`~flash_internimage.images.check_rgb`."""
    for i, image in enumerate(images):
        check_rgb(image, f"images[{i}]")


def no_released_weights(source: ModelSource) -> ValueError:
    """Return the error for a model that needs a checkpoint."""
    return ValueError(f"checkpoint must be given for {source.name}, which has no released weights")
