"""Mask2Former's head as the published segmentors were evaluated, and checked labels."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.registry import MODELS
from mmseg.models.decode_heads import Mask2FormerHead
from mmseg.models.segmentors import EncoderDecoder
from mmseg.models.utils import resize
from mmseg.structures import SegDataSample
from torch import Tensor

from .published_weights import LoadsPublishedWeights


@MODELS.register_module()
class CheckedEncoderDecoder(EncoderDecoder):
    """EncoderDecoder that rejects labels which are neither classes nor ignored.

    The losses would index with them, which ends in an IndexError on the CPU and in an assertion of
    the kernels on a GPU.
    """

    def loss(self, inputs: Tensor, data_samples: list[SegDataSample]) -> dict[str, Tensor]:
        """Compute the losses of a batch.

        Args:
            inputs: Normalized images, (N, C, H, W).
            data_samples: Label maps `gt_sem_seg`, (1, H, W) each.

        Raises:
            ValueError: If a label is neither a class of the head nor its `ignore_index`.
        """
        classes, ignored = self.decode_head.num_classes, self.decode_head.ignore_index
        labels = torch.stack([sample.gt_sem_seg.data for sample in data_samples])
        wrong = labels[((labels < 0) | (labels >= classes)) & (labels != ignored)].unique()
        if len(wrong):
            raise ValueError(
                f"gt_sem_seg must contain classes from 0 to {classes - 1}, or {ignored} for "
                f"ignored pixels, got {wrong[:10].tolist()}; the datasets read their ignore_index "
                "as 255"
            )
        return super().loss(inputs, data_samples)


@MODELS.register_module()
class CombineFirstMask2FormerHead(LoadsPublishedWeights, Mask2FormerHead):
    """Mask2FormerHead that combines class and mask scores before resizing the result.

    The products of class and mask probabilities are summed over the queries and then resized to the
    image, as in the evaluation of the published segmentors. mmseg 1 resizes the mask logits first.

    Args:
        args: Arguments of Mask2FormerHead.
        combine_first: Whether to combine before resizing. False selects the order of mmseg 1.
        kwargs: Keyword arguments of Mask2FormerHead.
    """

    published_prefix = "decode_head."

    def __init__(self, *args: Any, combine_first: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.combine_first = combine_first

    def predict(self, x: Sequence[Tensor], batch_img_metas: list[dict], test_cfg: dict) -> Tensor:
        """Predict the scores of all classes.

        Args:
            x: Feature maps of the backbone, (N, C, H, W) each.
            batch_img_metas: Metainfo of each image. The input size of the network is taken from the
                first one: `img_shape` if it is a :class:`torch.Size`, as mmseg's `slide_inference`
                sets it for windows, and otherwise `pad_shape` or, without one, `img_shape`.
            test_cfg: Unused.

        Returns:
            Scores at the input size of the network, (N, classes, H, W). They are not negative, but
            not normalized either.
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
