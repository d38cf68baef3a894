"""Detectors and segmentors of OpenMMLab, with the test pipelines of their configs."""

import copy
import importlib
import logging
import math
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, DefaultScope
from torch import nn

from ..checkpoints import (
    check_finite,
    check_state_dict,
    convert_checkpoint,
    fetch_checkpoint,
    load_checkpoint,
)
from ..classification.model import pick_device
from ..classification.precision import autocast
from ..openmmlab import safe_loading
from ..openmmlab.cli.config import read_config, require_dicts
from ..openmmlab.datasets.transforms import LoadCheckedArray
from ..openmmlab.engine.hooks.model import convert_outputs_to_float32
from ..openmmlab.errors import describe, is_users
from .predictor import ModelSource, Predictor, check_images, no_released_weights

_logger = logging.getLogger(__name__)

# Modules of a model whose `num_classes` is that of its outputs; the first that exists counts.
_HEADS = ("decode_head", "roi_head.bbox_head", "bbox_head")


@dataclass(frozen=True)
class LoadedModel:
    """A model of OpenMMLab and everything that predicting with it needs.

    Attributes:
        model: The model, in evaluation mode and on its device.
        tester: The model, or the wrapper that runs it with test-time augmentation.
        pipeline: Preprocessing of a dict with `img`.
        views: Number of augmented versions of an image, 1 without test-time augmentation.
        classes: Names of the classes.
        amp: Mixed-precision mode: 'off', 'bf16' or 'fp16'.
    """

    model: nn.Module
    tester: Any
    pipeline: Compose
    views: int
    classes: tuple[str, ...]
    amp: str


class OpenMMLabPredictor(Predictor):
    """Common part of detectors and segmentors.

    Args:
        loaded: The model.
        max_pixels: Size from which images are reduced before the prediction, which would take too
            much memory: OpenMMLab's models compute masks and logits for every pixel of the image.
    """

    def __init__(self, loaded: LoadedModel, max_pixels: float) -> None:
        self.model, self.classes = loaded.model, loaded.classes
        self.steps = loaded.pipeline.transforms
        self._loaded, self._max_pixels = loaded, max_pixels

    def _predict(self, images: Sequence[np.ndarray]) -> list[Any]:
        """Return OpenMMLab's data samples; images above the limit on pixels are reduced first."""
        check_images(images)
        pipeline = self._loaded.pipeline
        # Padding images to a common size would change their predictions.
        groups, packed = defaultdict(list), []
        for i, image in enumerate(map(self._reduce, images)):
            packed.append(pipeline({"img": image[..., ::-1]}))
            groups[image.shape, _shapes(packed[i]["inputs"])].append(i)
        device = next(self.model.parameters()).device
        predictions: list[Any] = [None] * len(packed)
        for indices in groups.values():
            batch = pseudo_collate([packed[i] for i in indices])
            with _without_noise(), torch.inference_mode(), autocast(device, self._loaded.amp):
                outputs = self._loaded.tester.test_step(batch)
            for i, output in zip(indices, outputs, strict=True):
                predictions[i] = output
        return predictions

    def _reduce(self, image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        factor = math.sqrt(self._max_pixels / (height * width))
        if factor >= 1:
            return image
        size = max(1, int(width * factor)), max(1, int(height * factor))
        _logger.warning(
            "an image of %d x %d pixels is reduced to %d x %d to save memory; the prediction is "
            "enlarged", width, height, *size,
        )  # fmt: skip
        return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


@contextmanager
def _without_noise() -> Iterator[None]:
    """Hide warnings of OpenMMLab that do not concern predictions."""
    with warnings.catch_warnings():
        # about losses, and about the label maps of test-time augmentation
        for message in ("Default ``avg_non_ignore``", "The shape of value will convert"):
            warnings.filterwarnings("ignore", message)
        yield


def _shapes(inputs: Any) -> tuple:
    views = inputs if isinstance(inputs, list) else [inputs]
    return tuple(tuple(view.shape) for view in views)


def load_model(
    source: ModelSource,
    checkpoint: str | os.PathLike | None,
    device: str,
    amp: str,
    tta: bool = False,
) -> LoadedModel:
    """Load a detector or segmentor; see :func:`~flash_internimage.inference.load_predictor`."""
    if source.config is None:
        raise ValueError(f"config must be set for {source.name}, got None")
    chosen = pick_device(device)
    path = _fetch(source, checkpoint)
    importlib.import_module(f"flash_internimage.openmmlab.{source.task}")
    cfg = read_config(source.config)
    require_dicts(cfg, "model")
    if tta and not (cfg.get("tta_model") and cfg.get("tta_pipeline")):
        raise ValueError(f"tta must be False for {source.name}: its config has no tta_pipeline")
    steps = _steps(cfg, source.name, tta)
    contents = convert_checkpoint(load_checkpoint(path))
    weights = contents["state_dict"]
    with (
        _without_noise(),
        DefaultScope.overwrite_default_scope(cfg.default_scope),
        safe_loading.safe_loading(),
    ):
        try:
            model = revert_sync_batchnorm(MODELS.build(copy.deepcopy(cfg.model)))
            pipeline = Compose([LoadCheckedArray(), *steps])
            tester = model
            if tta:
                tester = MODELS.build({**cfg.tta_model, "module": model})
        except Exception as error:  # OpenMMLab raises errors of any type for unknown settings.
            if not is_users(error):
                raise
            raise ValueError(f"{source.name} cannot be built: {describe(error)}") from error
        check_state_dict(model.state_dict(), weights)
        check_finite(weights)
        model.load_state_dict(weights)
        classes = _class_names(contents["meta"], cfg, model, source.name)
    if amp != "off":
        convert_outputs_to_float32(model)
    tester.to(chosen).eval()
    return LoadedModel(model, tester, pipeline, _count_views(steps), classes, amp)


def _fetch(source: ModelSource, checkpoint: str | os.PathLike | None) -> Path:
    if checkpoint is not None:
        return fetch_checkpoint(checkpoint)
    if source.entry is None:
        raise no_released_weights(source)
    return source.entry.fetch()


def _steps(cfg: Config, name: str, tta: bool) -> list[dict[str, Any]]:
    """Return the steps of the test pipeline that follow loading the image."""
    dataset = _test_dataset(cfg)
    steps = cfg.tta_pipeline if tta else dataset.get("pipeline") or cfg.get("test_pipeline")
    if not steps:
        raise ValueError(f"test_dataloader.dataset.pipeline of {name} must not be empty")
    return _without_loading(steps)


def _without_loading(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    kept = []
    for step in steps:
        if str(step["type"]).rpartition(".")[2].startswith("Load"):
            continue
        own: dict[str, Any] = copy.deepcopy(dict(step))
        if isinstance(parts := own.get("transforms"), list):
            # TestTimeAug has lists of alternatives, other wrappers a list of steps.
            if all(isinstance(part, list) for part in parts):
                own["transforms"] = [part for part in map(_without_loading, parts) if part]
            else:
                own["transforms"] = _without_loading(parts)
        kept.append(own)
    return kept


def _count_views(steps: Sequence[Mapping[str, Any]]) -> int:
    parts = [step["transforms"] for step in steps if step["type"] == "TestTimeAug"]
    return math.prod(len(alternatives) for part in parts for alternatives in part)


def _test_dataset(cfg: Config) -> Mapping[str, Any]:
    """Return the settings of the dataset for testing, inside of wrappers."""
    dataset = (cfg.get("test_dataloader") or {}).get("dataset") or {}
    while inner := dataset.get("dataset") or (dataset.get("datasets") or [None])[0]:
        dataset = inner
    return dataset


def _class_names(
    meta: Mapping[str, Any], cfg: Config, model: nn.Module, name: str
) -> tuple[str, ...]:
    """Return the class names in a checkpoint or, if it has none, in the config."""
    count = next(_output_counts(model), None)
    of_checkpoint = {key.lower(): v for key, v in (meta.get("dataset_meta") or meta).items()}
    dataset = _test_dataset(cfg)
    of_config: Mapping[str, Any] = dataset.get("metainfo") or {}
    kind = DATASETS.get(dataset["type"]) if "type" in dataset else None
    of_dataset = getattr(kind, "METAINFO", {})
    for found in (of_checkpoint, of_config, of_dataset):
        classes = found.get("classes")
        if isinstance(classes, list | tuple) and all(isinstance(c, str) for c in classes):
            if count is not None and len(classes) != count:
                raise ValueError(f"{name} must have {count} class names, got {len(classes)}")
            return tuple(classes)
    if count is None:
        raise ValueError(f"the checkpoint of {name} or its config must contain class names")
    return tuple(f"class_{i}" for i in range(count))


def _output_counts(model: nn.Module) -> Iterator[int]:
    for path in _HEADS:
        try:
            head = model.get_submodule(path)
        except AttributeError:
            continue
        head = head[-1] if isinstance(head, nn.ModuleList) else head
        count = getattr(head, "num_classes", None)
        if isinstance(count, int):
            yield count
