"""The multi-scale deformable attention layer."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import SpatialShapes, flash_deform_attn, to_integers
from ..ops import check_dense, to_int
from .common import NotScriptable, reset_projection


class FlashDeformAttn(NotScriptable):
    """Multi-scale deformable attention (arXiv:2010.04159, section 4.1) as in the DCNv4 package.

    Argument names and state-dict keys are those of the published layer. Unlike the published layer,
    it never rounds sampling locations to float16, not even under autocast.

    Args:
        d_model: Number of channels of queries, inputs and outputs.
        n_levels: Number of feature levels.
        n_heads: Number of attention heads; must divide `d_model`.
        n_points: Number of sampling points per query, head and level.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is below 1, or `n_heads` does not divide `d_model`.
    """

    def __init__(
        self,
        d_model: int = 256,
        n_levels: int = 4,
        n_heads: int = 8,
        n_points: int = 4,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_model = to_int(d_model, "d_model", minimum=1)
        n_levels, n_points = to_int(n_levels, "n_levels", 1), to_int(n_points, "n_points", 1)
        n_heads = to_int(n_heads, "n_heads")
        if n_heads < 1 or d_model % n_heads:
            raise ValueError(
                f"n_heads must be positive and divide d_model={d_model}, got {n_heads}"
            )
        self.d_model, self.n_levels = d_model, n_levels
        self.n_heads, self.n_points = n_heads, n_points
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2, **factory)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points, **factory)
        self.value_proj = nn.Linear(d_model, d_model, **factory)
        self.output_proj = nn.Linear(d_model, d_model, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize as in Deformable DETR.

        The points of each head start 1, 2, ... pixels away from the reference point, in one
        direction per head.
        """
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            bias = self.sampling_offsets.bias.view(self.n_heads, self.n_levels, self.n_points, 2)
            bias.copy_(initial_offsets(self.n_heads, self.n_points, bias.device)[:, None])
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        reset_projection(self.value_proj)
        reset_projection(self.output_proj)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: SpatialShapes,
        input_level_start_index: Tensor | Sequence[int] | None = None,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Apply the layer.

        Args:
            query: Queries of shape (N, Lq, C).
            reference_points: Points (x, y) of shape (N, Lq, L, 2), where (0, 0) is the top left
                corner of the image and (1, 1) the bottom right corner, or boxes (x, y, w, h) of
                shape (N, Lq, L, 4), where (x, y) is the center and offsets are relative to the box
                size. Points or boxes may be shared between images, queries or levels (a size of 1).
            input_flatten: Feature maps of shape (N, S, C), the levels concatenated.
            input_spatial_shapes: (H, W) of each level, of shape (L, 2).
            input_level_start_index: Index of the first pixel of each level, of shape (L,). Computed
                from `input_spatial_shapes` by default.
            input_padding_mask: Boolean mask of shape (N, S), True for pixels that count as zero.

        Returns:
            Output of shape (N, Lq, C).

        Raises:
            ValueError: If the shape or dtype of an argument is invalid; the message names the
                argument.
        """
        for name, tensor in (("query", query), ("input_flatten", input_flatten)):
            check_dense(name, tensor)
            if tensor.dim() != 3 or tensor.shape[-1] != self.d_model:
                raise ValueError(
                    f"{name} must be (N, length, {self.d_model}), got shape {tuple(tensor.shape)}"
                )
        if query.shape[0] != input_flatten.shape[0]:
            raise ValueError(
                "query and input_flatten must have one batch size, "
                f"got {query.shape[0]} and {input_flatten.shape[0]}"
            )
        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            shape, dtype = tuple(input_padding_mask.shape), input_padding_mask.dtype
            if shape != tuple(value.shape[:2]) or dtype != torch.bool:
                raise ValueError(
                    f"input_padding_mask must be {tuple(value.shape[:2])} of torch.bool like "
                    f"input_flatten, got shape {shape} of {dtype}"
                )
            value = value.masked_fill(input_padding_mask[..., None], 0)
        heads = (self.n_heads, self.n_levels, self.n_points)
        locations = sampling_locations(
            self.sampling_offsets(query).unflatten(-1, (*heads, 2)),
            reference_points,
            input_spatial_shapes,
        )
        logits = self.attention_weights(query).unflatten(-1, (self.n_heads, -1))
        output = flash_deform_attn(
            value.unflatten(-1, (self.n_heads, -1)),
            input_spatial_shapes,
            input_level_start_index,
            torch.cat((locations.flatten(3), logits.to(locations.dtype)), dim=-1),
            self.n_points,
        )
        return self.output_proj(output)

    def extra_repr(self) -> str:
        """Return the arguments to show in the string representation."""
        return (
            f"{self.d_model}, n_levels={self.n_levels}, n_heads={self.n_heads}, "
            f"n_points={self.n_points}"
        )


def initial_offsets(heads: int, points: int, device: torch.device) -> Tensor:
    """Return Deformable DETR's initial sampling offsets, of shape (heads, points, 2) in pixels.

    Point k of head m is k + 1 pixels away (in the maximum norm) in direction 2 * pi * m / heads.
    """
    angles = torch.arange(heads, device=device) * (2 * math.pi / heads)
    directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
    directions = directions / directions.abs().amax(-1, keepdim=True)
    return directions[:, None] * torch.arange(1, points + 1, device=device)[:, None]


def sampling_locations(
    offsets: Tensor, reference_points: Tensor, spatial_shapes: SpatialShapes
) -> Tensor:
    """Compute sampling locations from predicted offsets and reference points or boxes.

    Args:
        offsets: Offsets of shape (N, Lq, M, L, K, 2), in pixels of the level for reference points,
            or in units of half the box size divided by K for reference boxes.
        reference_points: Points of shape (N, Lq, L, 2) or boxes (x, y, w, h) of shape
            (N, Lq, L, 4); N, Lq and L may be 1.
        spatial_shapes: (H, W) of each level, of shape (L, 2).

    Returns:
        Locations of shape (N, Lq, M, L, K, 2), where 0 to 1 spans the level. Float32 if the offsets
        have 16 bits.

    Raises:
        ValueError: If `reference_points` or `spatial_shapes` does not match the offsets.
    """
    n, queries, _, levels, points, _ = offsets.shape
    sizes = to_integers("spatial_shapes", spatial_shapes).to(offsets.device, non_blocking=True)
    if tuple(sizes.shape) != (levels, 2):
        raise ValueError(
            f"spatial_shapes must be ({levels}, 2), with (H, W) of each level, "
            f"got shape {tuple(sizes.shape)}"
        )
    shape = (n, queries, levels)
    if (
        reference_points.dim() != 4
        or reference_points.shape[3] not in (2, 4)
        or any(
            size not in (full, 1) for size, full in zip(reference_points.shape, shape, strict=False)
        )
    ):
        raise ValueError(
            f"reference_points must be ({n}, {queries}, {levels}, 2) or (..., 4), or broadcast to "
            f"that, got shape {tuple(reference_points.shape)}"
        )
    dtype = torch.promote_types(offsets.dtype, torch.float32)
    reference_points = reference_points.to(dtype)[:, :, None, :, None]
    if reference_points.shape[-1] == 2:
        return reference_points + offsets.to(dtype) / sizes.flip(-1)[:, None]
    centers, sizes = reference_points.split(2, dim=-1)
    return centers + offsets.to(dtype) / points * sizes * 0.5
