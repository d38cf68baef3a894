"""Deformable attention encoders of mmdet with sizes that may be symbolic.

mmdet reads the sizes of feature maps from tensors, which fixes them when a model is traced.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Sizes = Sequence[tuple[int, int]]


def grid_points(height: int, width: int, like: Tensor) -> Tensor:
    """Return the centers of all pixels, (H * W, 2), as (x, y) in pixels."""
    x = torch.arange(width, dtype=like.dtype, device=like.device) + 0.5
    y = torch.arange(height, dtype=like.dtype, device=like.device) + 0.5
    # torch.onnx translates repeat_interleave wrongly if the number of repeats is symbolic.
    x, y = x.expand(height, -1), y.unsqueeze(1).expand(-1, width)
    return torch.stack([x, y], dim=-1).flatten(0, 1)


def width_height(size: Sequence[int], like: Tensor) -> Tensor:
    """Return the width and height of a (height, width) as a tensor.

    `Tensor.new_tensor` would fix sizes that are symbolic.
    """
    return torch.tensor([size[1], size[0]]).to(like)


def encode(
    layers: nn.ModuleList,
    maps: Sequence[Tensor],
    positions: Sequence[Tensor],
    points: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Run the layers of a deformable encoder.

    Args:
        layers: Layers of the encoder.
        maps: Projected feature maps, (N, C, H, W) each.
        positions: Position encodings, (1, C, H, W) each.
        points: Reference points, (1, S, levels, 2).
        mask: True for pixels that are padding, (1, S).

    Returns:
        (N, S, C), the pixels of all maps.
    """
    query, encoding = flatten_maps(maps), flatten_maps(positions)
    for layer in layers:
        query = layer(
            query=query,
            query_pos=encoding,
            key_padding_mask=mask,
            spatial_shapes=sizes_of(maps),
            level_start_index=None,
            reference_points=points,
        )
    return query


def sizes_of(maps: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Return the height and width of each map."""
    return [(x.shape[2], x.shape[3]) for x in maps]


def flatten_maps(maps: Sequence[Tensor]) -> Tensor:
    """Return the pixels of maps (N, C, H, W) as (N, S, C)."""
    return torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)
