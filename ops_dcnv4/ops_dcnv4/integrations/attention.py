"""Multi-scale deformable attention under the signatures of transformers and mmcv."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..attention import SpatialShapes, ms_deform_attn


def layer_forward(
    self: torch.nn.Module,
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_spatial_shapes_list: list[tuple[int, int]],
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Compute the forward of transformers' layer `MultiScaleDeformableAttention`."""
    return ms_deform_attn(
        value, value_spatial_shapes, level_start_index, sampling_locations, attention_weights
    )


def multi_scale_deformable_attention(
    value: Tensor,
    value_spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Compute the function of that name in transformers (Mask2Former, OneFormer) and mmcv."""
    return ms_deform_attn(value, value_spatial_shapes, None, sampling_locations, attention_weights)


def multi_scale_deformable_attention_v2(
    value: Tensor,
    value_spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: Sequence[int],
    method: str = "default",
) -> Tensor:
    """Compute the function of that name in transformers (RT-DETR v2, D-FINE).

    Args:
        value: See :func:`ops_dcnv4.ms_deform_attn`.
        value_spatial_shapes: See :func:`ops_dcnv4.ms_deform_attn`.
        sampling_locations: Coordinates of the points of all levels, (N, Lq, M, P, 2), where P is
            the sum of `num_points_list`.
        attention_weights: (N, Lq, M, P).
        num_points_list: Number of points on each level.
        method: Must be "default", bilinear sampling.
    """
    if method != "default":
        raise ValueError(f"method must be 'default' (bilinear sampling), got {method!r}")
    if len(set(num_points_list)) == 1:
        levels = len(num_points_list), num_points_list[0]
        locations = sampling_locations.unflatten(3, levels)
        weights = attention_weights.unflatten(3, levels)
    else:
        # A location of -1 is outside of the level, so that nothing is sampled there.
        locations = _pad_levels(sampling_locations, num_points_list, -1)
        weights = _pad_levels(attention_weights, num_points_list, 0)
    return ms_deform_attn(value, value_spatial_shapes, None, locations, weights)


def _pad_levels(points: Tensor, num_points_list: Sequence[int], filler: float) -> Tensor:
    """Split dimension 3 into levels, padded to the same number of points."""
    largest = max(num_points_list)
    levels = []
    for level, count in zip(points.split(list(num_points_list), 3), num_points_list, strict=True):
        padding = list(level.shape)
        padding[3] = largest - count
        levels += [level, points.new_full((1,), filler).expand(padding)]
    return torch.cat(levels, 3).unflatten(3, (len(num_points_list), largest))


def compilable_check(check: Callable[..., None]) -> Callable[..., None]:
    """Return transformers' `torch_compilable_check` such that compiled graphs can contain it.

    In PyTorch 2.12, Dynamo fails to trace `torch._check_tensor_all`, which transformers calls.
    """

    def torch_compilable_check(condition: Any, *arguments: Any, **options: Any) -> None:
        if isinstance(condition, Tensor) and torch.compiler.is_compiling():
            torch._assert_async(condition.all())
        else:
            check(condition, *arguments, **options)

    return torch_compilable_check


class MultiScaleDeformableAttnFunction:
    """Replacement of mmcv's autograd function, which its layer calls on GPUs."""

    @staticmethod
    def apply(
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: Any = None,
    ) -> Tensor:
        """Compute the attention; `im2col_step` is not needed."""
        return ms_deform_attn(
            value,
            value_spatial_shapes,
            value_level_start_index,
            sampling_locations,
            attention_weights,
        )
