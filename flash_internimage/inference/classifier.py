"""Classifiers of timm and of `classification.train`."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from ..checkpoints import (
    check_finite,
    check_state_dict,
    clean_state_dict,
    fetch_checkpoint,
    load_checkpoint,
)
from ..checkpoints.weights import classifier_names
from ..classification.config import Data, Model, load_config
from ..classification.data.classes import names_of
from ..classification.data.loaders import eval_transform
from ..classification.evaluation import warn_about_changes
from ..classification.model import check_model, create_model, pick_device, trained_settings
from ..classification.precision import autocast
from ..predictions import Classification
from .classify import class_names, describe_synsets, most_probable
from .predictor import ModelSource, Predictor, check_images, no_released_weights

_PREPROCESSING = ("image_size", "crop_pct", "interpolation", "mean", "std")


class Classifier(Predictor):
    """A classifier with its preprocessing.

    Args:
        model: Classifier of timm, in evaluation mode and on its device.
        transform: Preprocessing of an image of Pillow, which returns a tensor (3, H, W).
        classes: Names of the classes.
        amp: Mixed-precision mode: 'off', 'bf16' or 'fp16'.
        top_k: Number of classes to return, at most.
    """

    task = "classification"

    def __init__(
        self,
        model: nn.Module,
        transform: Callable[[Image.Image], Tensor],
        classes: Sequence[str],
        amp: str = "off",
        top_k: int = 5,
    ) -> None:
        self.model = model
        self.classes = tuple(classes)
        self.steps = getattr(transform, "transforms", [transform])
        self._transform, self._amp, self._top_k = transform, amp, top_k

    def __call__(self, images: Sequence[np.ndarray]) -> list[Classification]:
        """Classify images; see :meth:`Predictor.__call__`."""
        check_images(images)
        if not len(images):
            return []
        device = next(self.model.parameters()).device
        inputs = torch.stack([self._transform(Image.fromarray(image)) for image in images])
        with torch.inference_mode(), autocast(device, self._amp):
            logits = self.model(inputs.to(device))
        return most_probable(logits, self.classes, self._top_k)


def load_classifier(
    source: ModelSource,
    checkpoint: str | os.PathLike | None = None,
    device: str = "auto",
    amp: str = "off",
    top_k: int = 5,
) -> Classifier:
    """Load a classifier; see :func:`~flash_internimage.inference.load_predictor`."""
    chosen = pick_device(device)
    if checkpoint is None:
        model, transform = _released(source)
        names = None
    else:
        contents = load_checkpoint(fetch_checkpoint(checkpoint))
        model, transform = _trained(source, contents, str(checkpoint))
        names = names_of(contents)
    classes: int = model.num_classes  # type: ignore[assignment]
    if names is not None and len(names) != classes:
        raise ValueError(f"{checkpoint} must have {classes} class names, got {len(names)}")
    known = class_names(model, classes) if names is None else describe_synsets(names)
    return Classifier(model.to(chosen).eval(), transform, known, amp, top_k)


def _released(source: ModelSource) -> tuple[nn.Module, Callable]:
    """Return a model with its released weights, and its preprocessing."""
    if source.config is None:
        name, data = source.name, None
    else:
        cfg = load_config(source.config)
        name, data = cfg.model.name, cfg.data
        if source.entry is None:  # Its classifier would be random.
            raise no_released_weights(source)
    if timm.is_model(name):
        released = timm.get_pretrained_cfg(name, allow_unregistered=False)
        if released is None or not released.has_weights:
            raise no_released_weights(source)
        if not released.num_classes:
            raise ValueError(f"model must be a classifier, got '{name}'")
    model = timm.create_model(name, pretrained=True)
    return model, _transform(model) if data is None else eval_transform(data)


def _trained(
    source: ModelSource, contents: Mapping[str, Any], checkpoint: str
) -> tuple[nn.Module, Callable]:
    """Return a model with the weights of a checkpoint, and its preprocessing."""
    weights = clean_state_dict(contents)
    trained = trained_settings(contents)
    data: Data | None
    if source.config is not None:
        cfg = load_config(source.config)
        options, data = cfg.model.without_initial(), cfg.data
        warn_about_changes(cfg, contents)
    elif not timm.is_model(source.name):
        raise ValueError(f"checkpoint must not be given for {source.name}, which has its own")
    else:
        settings = trained.get("model", {})
        architecture = source.name.partition(".")[0]
        other = settings.get("name", architecture).partition(".")[0]
        if other != architecture:
            raise ValueError(f"{checkpoint} must be a checkpoint of {architecture}, got {other}")
        options = Model(
            name=architecture,
            num_classes=_count_classes(source.name, weights, checkpoint),
            drop_path_rate=0,
            args=settings.get("args", {}),
        )
        before = {key: v for key, v in trained.get("data", {}).items() if key in _PREPROCESSING}
        data = Data(**before) if before else None
    model = create_model(options)
    check_state_dict(model.state_dict(), weights)
    check_finite(weights)
    model.load_state_dict(weights)
    if data is None:
        return model, _transform(model)
    check_model(model, data.image_size, options.num_classes)
    return model, eval_transform(data)


def _count_classes(name: str, weights: Mapping[str, Tensor], checkpoint: str) -> int:
    """Return the number of classes of the weights of a classifier."""
    cfg = timm.get_pretrained_cfg(name)
    parts: Any = cfg.classifier if cfg else classifier_names(timm.create_model(name))
    for part in (parts,) if isinstance(parts, str) else parts or ():
        if (weight := weights.get(f"{part}.weight")) is not None and weight.dim() > 0:
            return len(weight)
    raise ValueError(f"{checkpoint} must contain the classifier of {name}")


def _transform(model: nn.Module) -> Callable:
    return create_transform(**resolve_model_data_config(model), is_training=False)
