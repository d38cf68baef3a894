"""Predict with classifiers, detectors and segmentors.

Example::

    from flash_internimage.inference import load_predictor, read_rgb

    predictor = load_predictor("flash_internimage_tiny.in1k")
    [result] = predictor([read_rgb("image.jpg")])
"""

from ..predictions import Classification, Detections, LabelMap, Result
from .classify import classify
from .predictor import Predictor, load_predictor
from .sources import read_rgb

__all__ = [
    "Classification",
    "Detections",
    "LabelMap",
    "Predictor",
    "Result",
    "classify",
    "load_predictor",
    "read_rgb",
]
