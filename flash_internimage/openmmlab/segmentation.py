"""What the segmentors need beside flash_internimage.openmmlab, which is imported with it.

Importing this module replaces the image loaders LoadImageFromFile, LoadImageFromNDArray and
InferencerLoader in mmseg's registry.

custom_imports = dict(imports=['flash_internimage.openmmlab.segmentation'])
"""

from collections.abc import Sequence

import torch
from mmengine.registry import MODELS
from mmseg.models.decode_heads import Mask2FormerHead
from mmseg.models.utils import resize
from mmseg.registry import TRANSFORMS
from mmseg.structures import SegDataSample
from torch import Tensor

from .files import LoadCheckedArray, LoadCheckedImage
from .label_maps import CheckedADE20KDataset, CheckedSegDataset, LoadCheckedAnnotations
from .published import LoadsPublishedWeights
from .segmentor_checks import CheckSegmentorHook

__all__ = [
    "CheckSegmentorHook",
    "CheckedADE20KDataset",
    "CheckedSegDataset",
    "LoadCheckedAnnotations",
    "PublishedMask2FormerHead",
]

TRANSFORMS.register_module("LoadImageFromFile", module=LoadCheckedImage, force=True)
TRANSFORMS.register_module("LoadImageFromNDArray", module=LoadCheckedArray, force=True)
TRANSFORMS.register_module("InferencerLoader", module=LoadCheckedArray, force=True)


@MODELS.register_module()
class PublishedMask2FormerHead(LoadsPublishedWeights, Mask2FormerHead):
    """Mask2FormerHead that combines the scores of classes and masks at the masks' own resolution.

    The sum over the queries of a class's probability times a mask's is resized to the image, as the
    published segmentors were evaluated. mmseg 1 resizes the masks' logits first and combines then.

    Args:
        combine_first: False for the order of mmseg 1. The other arguments are those of
            Mask2FormerHead.
    """

    published_prefix = "decode_head."

    def __init__(self, *args, combine_first: bool = True, **kwargs):
        super().__init__(*args, **kwargs)
        self.combine_first = combine_first

    def predict(self, x: Sequence[Tensor], batch_img_metas: list[dict], test_cfg: dict) -> Tensor:
        """Predict the scores of all classes.

        Args:
            x: Feature maps of the backbone, (N, C, H, W) each.
            batch_img_metas: Of each image. The first one has the size of the network's input, which
                is that of a window if its `img_shape` is a :class:`torch.Size` (mmseg's
                `slide_inference` sets it), and else `pad_shape` or `img_shape`.
            test_cfg: Not used.

        Returns:
            Scores, (N, classes, H, W) of the network's input; at least 0, not normalised.
        """
        size = batch_img_metas[0]["img_shape"]
        if not isinstance(size, torch.Size):
            size = batch_img_metas[0].get("pad_shape", size)
        size = size[:2]
        if not self.combine_first:
            metas = [{**metainfo, "pad_shape": size} for metainfo in batch_img_metas]
            return super().predict(x, metas, test_cfg)
        samples = [SegDataSample(metainfo=metainfo) for metainfo in batch_img_metas]
        classes, masks = (predictions[-1] for predictions in self(x, samples))
        scores = torch.einsum("nqc,nqhw->nchw", classes.softmax(-1)[..., :-1], masks.sigmoid())
        return resize(scores, size, mode="bilinear", align_corners=self.align_corners)
