"""mmseg integration: Mask2Former as published, datasets and checks.

Importing this module also imports `flash_internimage.openmmlab`.

Example::

    custom_imports = dict(imports=['flash_internimage.openmmlab.segmentation'])
"""

from mmseg.registry import TRANSFORMS

from .datasets.segmentation import CheckedADE20KDataset, CheckedSegDataset
from .datasets.transforms import LoadCheckedAnnotations
from .engine.hooks.check_segmentor import CheckSegmentorHook
from .models.segmentors import CheckedEncoderDecoder, CombineFirstMask2FormerHead
from .safe_loading import register_image_loaders
from .visualization.segmentation import CaptionedSegVisualizer

__all__ = [
    "CaptionedSegVisualizer",
    "CheckSegmentorHook",
    "CheckedADE20KDataset",
    "CheckedEncoderDecoder",
    "CheckedSegDataset",
    "CombineFirstMask2FormerHead",
    "LoadCheckedAnnotations",
]

register_image_loaders(TRANSFORMS)
