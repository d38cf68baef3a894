"""Segmentors of mmseg in the form that is exported."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.models.layers import MSDeformAttnPixelDecoder
from mmseg.models.decode_heads import Mask2FormerHead
from torch import Tensor, nn

from ..openmmlab.models.attention import use_flash_attention
from .deformable_encoder import encode, grid_points, sizes_of, width_height
from .models import ExportableModel


class ExportableSegmentor(ExportableModel):
    """A segmentor: `scores`, (N, classes, H, W); the class of a pixel has the highest score."""

    outputs = ("scores",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        test: Any = model.test_cfg
        if test.mode != "whole":
            raise ValueError(f"test_cfg.mode must be 'whole', got {test.mode!r}")
        self.traced = copy.deepcopy(model)
        use_flash_attention(self.traced)
        for name, module in [*self.traced.named_modules()]:
            if isinstance(module, nn.AdaptiveAvgPool2d):
                size: Any = module.output_size
                self.traced.set_submodule(name, AnySizeAveragePool(size))
        head: Any = model.decode_head
        if isinstance(head, Mask2FormerHead):
            decoder: Any = self.traced.get_submodule("decode_head.pixel_decoder")
            decoder.forward = lambda maps: decode_pixels(decoder, maps)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the scores; see :class:`ExportableModel`."""
        model: Any = self.traced
        head = model.decode_head
        maps, size = model.extract_feat(images), images.shape[2:]
        if not isinstance(head, Mask2FormerHead):
            return (self._resize(head(maps), size),)
        classes, masks = (predictions[-1] for predictions in head(maps, []))
        probabilities = classes.softmax(-1)[..., :-1]
        if getattr(head, "combine_first", False):
            scores = torch.einsum("nqc,nqhw->nchw", probabilities, masks.sigmoid())
            return (self._resize(scores, size),)
        masks = F.interpolate(masks, size, mode="bilinear", align_corners=False)
        return (torch.einsum("nqc,nqhw->nchw", probabilities, masks.sigmoid()),)

    def _resize(self, scores: Tensor, size: Sequence[int]) -> Tensor:
        align: Any = self.traced.align_corners
        return F.interpolate(scores, size, mode="bilinear", align_corners=align)

    def eager(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the scores by mmseg."""
        model: Any = self.model
        return (model.encode_decode(images, [{"img_shape": tuple(images.shape[2:])}]),)


class AnySizeAveragePool(nn.Module):
    """Adaptive average pooling by products with matrices, which traces for any size.

    Args:
        output_size: Number of rows and of columns of the result.
    """

    def __init__(self, output_size: int | tuple[int, int]) -> None:
        super().__init__()
        self.sizes = (output_size,) * 2 if isinstance(output_size, int) else output_size

    def forward(self, x: Tensor) -> Tensor:
        """Pool a map (N, C, H, W)."""
        rows = _pooling_weights(x.shape[2], self.sizes[0], x)
        columns = _pooling_weights(x.shape[3], self.sizes[1], x)
        return rows @ x @ columns.T


def _pooling_weights(size: int, bins: int, like: Tensor) -> Tensor:
    """Return the weights (bins, size) with which pixels contribute to bins."""
    pixel = torch.arange(size, device=like.device)
    index = torch.arange(bins, device=like.device).unsqueeze(1)
    inside = (pixel >= index * size // bins) & (pixel < ((index + 1) * size + bins - 1) // bins)
    weights = inside.to(like.dtype)
    return weights / weights.sum(1, keepdim=True)


def decode_pixels(
    decoder: MSDeformAttnPixelDecoder, maps: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Run Mask2Former's pixel decoder, as its `forward` does.

    Args:
        decoder: The decoder.
        maps: Feature maps of the backbone, finest first.

    Returns:
        The features of masks, (N, C, H, W), and the maps of several scales, coarsest first.
    """
    coarse = list(reversed(maps))[: decoder.num_encoder_levels]
    projected = [conv(x) for conv, x in zip(decoder.input_convs, coarse, strict=True)]
    positions, points = [], []
    for level, x in enumerate(projected):
        height, width = x.shape[2:]
        # The same encoding for all images, as none is padded.
        encoding = decoder.postional_encoding(x.new_zeros((1, height, width), dtype=torch.bool))
        positions.append(encoding + decoder.level_encoding.weight[level].view(1, -1, 1, 1))
        points.append(grid_points(height, width, x) / width_height((height, width), x))
    all_points = torch.cat(points)[None, :, None].expand(-1, -1, len(projected), -1)
    memory = encode(decoder.encoder.layers, projected, positions, all_points).transpose(1, 2)
    sizes = sizes_of(projected)
    parts = memory.split([height * width for height, width in sizes], dim=-1)
    outputs = [part.unflatten(-1, size) for part, size in zip(parts, sizes, strict=True)]
    for i in reversed(range(decoder.num_input_levels - decoder.num_encoder_levels)):
        lateral = decoder.lateral_convs[i](maps[i])
        size = lateral.shape[-2:]
        above = F.interpolate(outputs[-1], size=size, mode="bilinear", align_corners=False)
        outputs.append(decoder.output_convs[i](lateral + above))
    return decoder.mask_feature(outputs[-1]), outputs[: decoder.num_outs]
