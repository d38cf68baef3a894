"""Detectors of mmdet."""

import math
import os
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch

from ..predictions import Detections
from .openmmlab import LoadedModel, OpenMMLabPredictor, load_model
from .predictor import ModelSource

# A detector computes a mask of one byte per pixel of the image for up to 100 objects.
MAX_PIXELS_WITH_MASKS = 16_000_000
# Bytes of the masks of an image.
MAX_MASKS = 2**31


class Detector(OpenMMLabPredictor):
    """A detector, with or without masks.

    Images of more than 16 megapixels are reduced before a prediction with masks.

    Args:
        loaded: The model.
        score_threshold: Minimum score of the objects to return.
    """

    task = "detection"

    def __init__(self, loaded: LoadedModel, score_threshold: float = 0.3) -> None:
        with_masks = bool(getattr(loaded.model, "with_mask", False))
        super().__init__(loaded, MAX_PIXELS_WITH_MASKS if with_masks else math.inf)
        self._threshold = score_threshold

    def __call__(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """Detect objects; see :meth:`Predictor.__call__`."""
        samples = self._predict(images)
        return [
            self._convert(sample.pred_instances, image.shape[:2], sample.ori_shape)
            for image, sample in zip(images, samples, strict=True)
        ]

    def _convert(
        self, found: Any, shape: tuple[int, int], predicted: tuple[int, int]
    ) -> Detections:
        """Convert instances of mmdet in an image of the size `predicted` to one of `shape`."""
        boxes = getattr(found.bboxes, "tensor", found.bboxes).float()
        scores = found.scores.float()
        if not (boxes.isfinite().all() and scores.isfinite().all()):
            raise ValueError("boxes and scores must be finite, got NaN or infinity")
        order = torch.argsort(scores, descending=True, stable=True)
        order = order[scores[order] >= self._threshold]
        boxes = boxes[order].cpu().numpy()
        masks = None
        if "masks" in found:
            # Masks that were computed on the CPU are there.
            masks = found.masks[order.to(found.masks.device)].cpu().numpy().astype(bool, copy=False)
        if tuple(predicted) != shape:
            (height, width), (h, w) = shape, predicted
            boxes = boxes * np.array([width / w, height / h] * 2, np.float32)
            if masks is not None:
                masks = _enlarge(masks, shape)
        return Detections(
            boxes,
            scores[order].cpu().numpy(),
            found.labels[order].cpu().numpy().astype(np.int64),
            masks,
            self.classes,
        )


def _enlarge(masks: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    height, width = shape
    if len(masks) * height * width > MAX_MASKS:
        raise ValueError(
            f"{len(masks)} masks of {width} x {height} pixels take more than 2 GiB: raise the "
            "score threshold"
        )
    enlarged = np.empty((len(masks), *shape), bool)
    for mask, target in zip(masks, enlarged, strict=True):
        target[:] = cv2.resize(
            mask.astype(np.uint8), shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT
        )
    return enlarged


def load_detector(
    source: ModelSource,
    checkpoint: str | os.PathLike | None = None,
    device: str = "auto",
    amp: str = "off",
    score_threshold: float = 0.3,
) -> Detector:
    """Load a detector; see :func:`~flash_internimage.inference.load_predictor`."""
    return Detector(load_model(source, checkpoint, device, amp), score_threshold)
