"""The predictions of all tasks, as NumPy arrays."""

from dataclasses import dataclass

import numpy as np


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
