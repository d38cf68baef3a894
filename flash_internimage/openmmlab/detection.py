"""mmdet integration: DINO as published, COCO datasets and metrics.

Importing this module also imports `flash_internimage.openmmlab`.

Example::

    custom_imports = dict(imports=['flash_internimage.openmmlab.detection'])
"""

import faster_coco_eval  # noqa: F401  mmdet would not notice before the first evaluation
from mmdet.registry import METRICS, TRANSFORMS

from .datasets.coco import CheckedCocoDataset
from .evaluation.coco_metric import CheckedCocoMetric, CheckedPycocotoolsMetric
from .models.detectors import ClampedReferenceDINOHead, HalfWidthEncodingDINO
from .readers import add_image_loaders, add_reader

__all__ = [
    "CheckedCocoDataset",
    "CheckedCocoMetric",
    "CheckedPycocotoolsMetric",
    "ClampedReferenceDINOHead",
    "HalfWidthEncodingDINO",
]

add_image_loaders(TRANSFORMS)
add_reader(METRICS, "FasterCocoMetric", CheckedCocoMetric)
add_reader(METRICS, "CocoMetric", CheckedPycocotoolsMetric)
