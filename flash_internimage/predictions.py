"""The predictions of all tasks, as NumPy arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Classification:
    """The most probable classes of an image, best first.

    Attributes:
        scores: (k,) float32, probabilities.
        labels: (k,) int64, indices of the classes.
        names: (k,) names of the classes.
    """

    scores: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]


@dataclass(frozen=True)
class Detections:
    """The objects in an image, in descending order of their scores.

    Attributes:
        boxes: (n, 4) float32, x1, y1, x2 and y2 in pixels of the image.
        scores: (n,) float32.
        labels: (n,) int64, indices into `classes`.
        masks: (n, H, W) bool; None for detectors without masks.
        classes: Names of all classes of the model.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None
    classes: tuple[str, ...]

    @classmethod
    def of(
        cls,
        boxes: ArrayLike,
        labels: ArrayLike,
        classes: Sequence[str],
        *,
        scores: ArrayLike | None = None,
        masks: ArrayLike | None = None,
    ) -> "Detections":
        """Return detections or, without scores, annotations, converting lists and dtypes.

        Args:
            boxes: (n, 4), x1, y1, x2 and y2 in pixels of the image.
            labels: (n,), indices into `classes`.
            classes: Names of all classes of the model.
            scores: (n,); None for annotations, whose scores are NaN.
            masks: (n, H, W); None for objects without masks.
        """
        labels = np.asarray(labels, np.int64)
        return cls(
            boxes=np.asarray(boxes, np.float32).reshape(-1, 4),
            scores=np.asarray(
                np.full(labels.shape, np.nan) if scores is None else scores, np.float32
            ),
            labels=labels,
            masks=None if masks is None else np.asarray(masks, bool),
            classes=tuple(classes),
        )


@dataclass(frozen=True)
class LabelMap:
    """The class of each pixel of an image.

    Attributes:
        labels: (H, W) uint8, or int64 for more than 256 classes, indices into `classes`.
        classes: Names of all classes of the model.
    """

    labels: np.ndarray
    classes: tuple[str, ...]


Result = Classification | Detections | LabelMap
