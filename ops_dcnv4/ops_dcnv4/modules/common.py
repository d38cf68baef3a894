"""Code shared by the layers."""

import math

import torch
from torch import Tensor, nn


class NotScriptable(nn.Module):
    """Base class that makes torch.jit.script fail with a clear error before compiling anything."""

    def __prepare_scriptable__(self) -> None:
        raise NotImplementedError(
            f"{type(self).__name__} cannot be compiled by torch.jit.script: use torch.export, "
            "torch.compile or torch.jit.trace"
        )


def offset_mask_channels(groups: int, taps: int) -> int:
    """Return the number of `offset_mask` channels, padded to a multiple of 8 as published."""
    return math.ceil(groups * taps * 3 / 8) * 8


def reset_offset_mask(linear: nn.Linear, groups: int, taps: int, modulation: float) -> None:
    """Initialize the prediction of `offset_mask`: zero offsets, constant modulation."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    if modulation:
        with torch.no_grad():
            linear.bias[: 3 * groups * taps].view(groups, -1)[:, 2 * taps :] = modulation


def reset_projection(linear: nn.Linear) -> None:
    """Initialize a projection as published: Xavier weights, zero bias."""
    nn.init.xavier_uniform_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def softmax_over_taps(scores: Tensor, groups: int) -> Tensor:
    """Return the softmax over the taps of each group, as in DCNv3.

    Args:
        scores: Scores of shape (N, H, W, groups * taps).
        groups: Number of groups.

    Returns:
        Tensor of the same shape and dtype.
    """
    parts = scores.unflatten(3, (groups, scores.shape[3] // groups))
    if scores.device.type == "cpu":
        # On CPUs, PyTorch vectorizes the softmax over the first dimension, but not over short rows.
        result = parts.movedim(4, 0).softmax(0).movedim(0, 4)
    else:
        result = parts.softmax(4)
    return result.flatten(3).to(scores.dtype)  # autocast computes in float32
