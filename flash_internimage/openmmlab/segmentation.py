"""What the segmentors need beside flash_internimage.openmmlab, which is imported with it.

Importing this module replaces the image loader LoadImageFromFile in mmseg's registry.

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

from .files import LoadCheckedImage
from .label_maps import CheckedADE20KDataset, CheckedSegDataset, LoadCheckedAnnotations
from .published import LoadsPublishedWeights

__all__ = [
    "CheckedADE20KDataset",
    "CheckedSegDataset",
    "LoadCheckedAnnotations",
    "PublishedMask2FormerHead",
]

TRANSFORMS.register_module("LoadImageFromFile", module=LoadCheckedImage, force=True)


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
        """
        Args:
            x: maps of the backbone, (N, C, H, W) each.
            batch_img_metas: of each image; all have the `pad_shape` or else `img_shape` of the
                network's input.
            test_cfg: not used.

        Returns:
            Scores, (N, classes, H, W) of the network's input; at least 0, not normalised.
        """
        if not self.combine_first:
            return super().predict(x, batch_img_metas, test_cfg)
        samples = [SegDataSample(metainfo=metainfo) for metainfo in batch_img_metas]
        classes, masks = (predictions[-1] for predictions in self(x, samples))
        scores = torch.einsum("nqc,nqhw->nchw", classes.softmax(-1)[..., :-1], masks.sigmoid())
        size = batch_img_metas[0].get("pad_shape", batch_img_metas[0]["img_shape"])[:2]
        return resize(scores, size, mode="bilinear", align_corners=self.align_corners)
