"""Layers that replace the forward of layers of the same name."""

import torch
from torch import Tensor

from .operators import ms_deform_attn


class MultiScaleDeformableAttention(torch.nn.Module):
    """Multi-scale deformable attention, under the signature of transformers."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: list[tuple],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """Compute the attention.

        Args:
            value: Pixels of all levels, (N, S, M, D).
            value_spatial_shapes: (H, W) of each of the L levels, (L, 2).
            value_spatial_shapes_list: The same as a list; not used.
            level_start_index: Index of the first pixel of each level, (L,).
            sampling_locations: Coordinates (x, y) of the points, (N, Lq, M, L, K, 2).
            attention_weights: Weights of the points, (N, Lq, M, L, K).
            im2col_step: Not used.

        Returns:
            Tensor of shape (N, Lq, M * D).
        """
        return ms_deform_attn(
            value, value_spatial_shapes, level_start_index, sampling_locations, attention_weights
        )
