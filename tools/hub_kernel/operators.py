"""Multi-scale deformable attention as an operator of PyTorch, with its gradient."""

from typing import Any

import torch
from torch import Tensor

from . import triton_kernels  # type: ignore[attr-defined]  # write_hub_kernel adds the module

# `kernels` gives each version of the package its own name, and so its own operators.
_NAMESPACE = __package__.rpartition(".")[2]


@torch.library.custom_op(f"{_NAMESPACE}::ms_deform_attn", mutates_args=())
def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Sample each level bilinearly at the locations, and sum the samples with the weights.

    Args:
        value: Pixels of all levels, (N, S, M, D). Float32, float64, float16 or bfloat16.
        spatial_shapes: (H, W) of each of the L levels, int64 of shape (L, 2).
        level_start_index: Index of the first pixel of each level, int64 of shape (L,).
        sampling_locations: Coordinates (x, y) of K points per level, (N, Lq, M, L, K, 2), from
            (0, 0), the top left corner of a level, to (1, 1).
        attention_weights: Weights of the points, (N, Lq, M, L, K).

    Returns:
        Tensor of shape (N, Lq, M * D).
    """
    return triton_kernels.ms_deform_attn(
        value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    )


@torch.library.custom_op(f"{_NAMESPACE}::ms_deform_attn_backward", mutates_args=())
def _backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return triton_kernels.ms_deform_attn_backward(
        grad_output,
        value,
        spatial_shapes,
        level_start_index,
        sampling_locations,
        attention_weights,
    )


@ms_deform_attn.register_fake
def _fake(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    n, _, heads, channels = value.shape
    return value.new_empty(n, sampling_locations.shape[1], heads * channels)


@_backward.register_fake
def _fake_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    value, locations, weights = (
        tensor.new_empty(tensor.shape) for tensor in (value, sampling_locations, attention_weights)
    )
    return value, locations, weights


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    grad_value, grad_locations, grad_weights = _backward(grad_output, *ctx.saved_tensors)
    return grad_value, None, None, grad_locations, grad_weights


ms_deform_attn.register_autograd(_differentiate, setup_context=_save)
