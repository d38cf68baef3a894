"""mmdet integration: DINO as published, COCO datasets and metrics.

Importing this module also imports `flash_internimage.openmmlab`.

Example::

    custom_imports = dict(imports=['flash_internimage.openmmlab.detection'])
"""

import faster_coco_eval  # noqa: F401  mmdet would not notice before the first evaluation
from mmdet.registry import METRICS, TRANSFORMS

from .datasets.coco import CheckedCocoDataset
from .engine.hooks.class_weights import CheckDetectorHook
from .evaluation.coco_metric import CheckedCocoMetric, CheckedPycocotoolsMetric
from .models.detectors import ClampedReferenceDINOHead, HalfWidthEncodingDINO
from .safe_loading import register_image_loaders, register_override
from .visualization.detection import CaptionedDetVisualizer

__all__ = [
    "CaptionedDetVisualizer",
    "CheckDetectorHook",
    "CheckedCocoDataset",
    "CheckedCocoMetric",
    "CheckedPycocotoolsMetric",
    "ClampedReferenceDINOHead",
    "HalfWidthEncodingDINO",
]

register_image_loaders(TRANSFORMS)
register_override(METRICS, "FasterCocoMetric", CheckedCocoMetric)
register_override(METRICS, "CocoMetric", CheckedPycocotoolsMetric)
