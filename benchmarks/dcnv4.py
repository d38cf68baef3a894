"""DCNv4 benchmark: shapes, inputs, alternative implementations and baselines."""

import argparse
import functools
import math
import re
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.competitors import (
    Competitor,
    away_from_integers,
    load,
    require,
    run_reference,
    run_triton,
)
from ops_dcnv4 import dcnv4, reference

TAPS, WINDOW, HEAD_CHANNELS = 9, 7, 32
CPU_TOKENS = 4096  # limit for global attention on the CPU, which is too slow with more
Pair = tuple[int, int]


@dataclass(frozen=True)
class Shape:
    """Size of a call of DCNv4 with a 3x3 window that keeps the image size."""

    n: int
    height: int
    width: int
    channels: int
    group_channels: int = 16

    form: ClassVar = "NxHxWxC or NxHxWxC/D, such as 64x56x56x128/32"
    family: ClassVar = "DCNv4"
    samples: ClassVar = TAPS  # sampling points per output channel
    competitors: ClassVar[dict[str, Competitor]]  # the first is ours
    references: ClassVar[list[Competitor]]  # ground truth for the competitors

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Parse a shape; return None if `text` has another form."""
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3}(/[1-9]\d*)?", text):
            return None
        shape = cls(*map(int, re.split("[x/]", text)))
        if shape.channels % shape.group_channels:
            raise argparse.ArgumentTypeError(
                f"C must be divisible by D, got {text!r} with C = {shape.channels} "
                f"and D = {shape.group_channels}"
            )
        return shape

    def __str__(self) -> str:
        return f"{self.n}x{self.height}x{self.width}x{self.channels}/{self.group_channels}"

    @property
    def groups(self) -> int:
        """Return the number of channel groups."""
        return self.channels // self.group_channels

    @property
    def used_channels(self) -> dict[str, int]:
        """Return the number of channels without padding of the tensors that are padded."""
        return {"offset_mask": 3 * TAPS * self.groups}

    def random_inputs(self, dtype: torch.dtype, device: torch.device) -> "Inputs":
        """Return random inputs that require gradients."""

        def randn(*size: int) -> Tensor:
            return torch.randn(size, dtype=dtype, device=device)

        size = self.n, self.height, self.width
        packed = torch.randn(*size, self.groups, 3 * TAPS, device=device)
        packed[..., : 2 * TAPS] = away_from_integers(0.5 * packed[..., : 2 * TAPS])
        padding = -3 * TAPS * self.groups % 8  # as in the DCNv4 layer
        offset_mask = F.pad(packed.flatten(3).to(dtype), (0, padding))
        return Inputs(
            value=randn(*size, self.channels).requires_grad_(),
            offset_mask=offset_mask.requires_grad_(),
            qkv=randn(*size, 3 * self.channels).requires_grad_(),
            weight=(randn(self.channels, 1, WINDOW, WINDOW) / WINDOW).requires_grad_(),
            grad_output=randn(*size, self.channels),
            shape=self,
        )


@dataclass(frozen=True)
class Inputs:
    """Inputs of all implementations and baselines."""

    value: Tensor  # (N, H, W, C)
    offset_mask: Tensor  # (N, H, W, 3 * TAPS * groups, padded)
    qkv: Tensor  # (N, H, W, 3 * C), for attention
    weight: Tensor  # (C, 1, 7, 7), for the depth-wise convolution
    grad_output: Tensor  # (N, H, W, C)
    shape: Shape

    @property
    def window(self) -> tuple[Pair, Pair, Pair, Pair, int, float, bool]:
        """Return the arguments of the operator after the tensors."""
        return (3, 3), (1, 1), (1, 1), (1, 1), self.shape.groups, 1.0, False

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Pair, Pair, Pair, Pair, int, float, bool]:
        """Return all arguments of the operator."""
        return self.value, self.offset_mask, *self.window

    @property
    def packed(self) -> Tensor:
        """Return offsets and modulation of each group, (N, H, W, groups, 3 * TAPS)."""
        used = self.offset_mask[..., : self.shape.used_channels["offset_mask"]]
        return used.unflatten(3, (self.shape.groups, -1))


def images_of_groups(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """Return the groups of value as separate images, (N * groups, D, H, W)."""
    value = inputs.value.to(dtype).unflatten(3, (inputs.shape.groups, -1))
    return value.permute(0, 3, 4, 1, 2).flatten(0, 1)


def run_grid_sample(inputs: Inputs) -> Tensor:
    """Run the usual implementation without a kernel, around `grid_sample`.

    Like the fallbacks of DCNv3 and Deformable DETR, it has one row of the grid per output pixel.
    16-bit inputs are sampled in float32.
    """
    n, height, width, _ = inputs.value.shape
    dtype = reference.compute_dtype(inputs.value.dtype)
    offset_mask = inputs.offset_mask.to(dtype)
    x, y, modulation = reference.sampling_points(offset_mask, *inputs.window)
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), dim=-1)
    grid = grid.flatten(1, 2).transpose(1, 2).flatten(0, 1)  # (N * groups, H * W, TAPS, 2)
    samples = F.grid_sample(images_of_groups(inputs, dtype), grid, align_corners=False)
    modulation = modulation.flatten(1, 2).transpose(1, 2).flatten(0, 1).unsqueeze(1)
    output = (samples * modulation).sum(-1).unflatten(0, (n, -1)).flatten(1, 2)
    return output.transpose(1, 2).unflatten(1, (height, width)).to(inputs.value.dtype)


@functools.cache
def regular_grid(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the normalized positions (x, y) of the taps without offsets, (H, TAPS, W, 2)."""
    rows, columns = (torch.arange(n, dtype=dtype, device=device) for n in (height, width))
    column_steps, row_steps = torch.cartesian_prod(*[torch.arange(-1, 2, device=device)] * 2).T
    x = (2 * (columns + column_steps[:, None]) + 1) / width - 1
    y = (2 * (rows[:, None] + row_steps) + 1) / height - 1
    return torch.stack(torch.broadcast_tensors(x, y[..., None]), dim=-1)


def run_tuned_grid_sample(inputs: Inputs) -> Tensor:
    """Run an optimized implementation around `grid_sample`.

    The regular grid is cached, and the grid is ordered by row, tap and column, so that neighbors
    in memory are neighbors in the image.
    """
    n, height, width, _ = inputs.value.shape
    dtype, device = reference.compute_dtype(inputs.value.dtype), inputs.value.device
    packed = inputs.packed.to(dtype).permute(0, 3, 1, 4, 2)  # (N, groups, H, 3 * TAPS, W)
    offsets, modulation = packed.split([2 * TAPS, TAPS], dim=3)
    to_normalized = torch.tensor([2 / width, 2 / height], dtype=dtype, device=device)
    offsets = offsets.unflatten(3, (TAPS, 2)).transpose(4, 5) * to_normalized
    grid = regular_grid(height, width, dtype, device) + offsets  # (N, groups, H, TAPS, W, 2)
    grid = grid.flatten(0, 1).flatten(2, 3)
    samples = F.grid_sample(images_of_groups(inputs, dtype), grid, align_corners=False)
    samples = samples.unflatten(3, (TAPS, width)).unflatten(0, (n, -1))
    output = (samples * modulation.contiguous().unsqueeze(2)).sum(4)
    return output.permute(0, 3, 4, 1, 2).flatten(3).to(inputs.value.dtype)


def run_deform_conv2d(inputs: Inputs) -> Tensor:
    """Run torchvision's modulated deformable convolution, depth-wise with all weights equal to one.

    This computes the same as DCNv4. Its taps are ordered row by row, and its offsets are (dy, dx).
    """
    offsets, modulation = inputs.packed.split([2 * TAPS, TAPS], dim=4)
    offsets = offsets.unflatten(4, (3, 3, 2)).permute(0, 3, 5, 4, 6, 1, 2).flip(4)
    modulation = modulation.unflatten(4, (3, 3)).permute(0, 3, 5, 4, 1, 2)
    output = load("torchvision.ops").deform_conv2d(
        inputs.value.permute(0, 3, 1, 2),
        offsets.flatten(1, 4),
        inputs.value.new_ones(inputs.shape.channels, 1, 3, 3),
        padding=1,
        mask=modulation.flatten(1, 3),
    )
    return output.permute(0, 2, 3, 1)


def run_published(inputs: Inputs) -> Tensor:
    """Run the operator of the published package."""
    pairs, shape = (3, 3, 1, 1, 1, 1, 1, 1), inputs.shape
    parameters = (*pairs, shape.groups, shape.group_channels, 1.0, 256, 0)
    function = load("DCNv4.functions").DCNv4Function
    return function.apply(inputs.value, inputs.offset_mask, *parameters)


def run_depthwise(inputs: Inputs) -> Tensor:
    """Run a 7x7 depth-wise convolution."""
    image = inputs.value.permute(0, 3, 1, 2)  # channels-last memory
    output = F.conv2d(image, inputs.weight, padding=WINDOW // 2, groups=inputs.shape.channels)
    return output.permute(0, 2, 3, 1)


def attend(tokens: Tensor) -> Tensor:
    """Run attention on tokens (B, L, 3 * C); return (B, L, C)."""
    require(tokens.shape[2] % (3 * HEAD_CHANNELS) == 0, f"heads of {HEAD_CHANNELS} channels")
    qkv = tokens.unflatten(2, (3, -1, HEAD_CHANNELS)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)


def run_window_attention(inputs: Inputs) -> Tensor:
    """Run Swin's window attention, including the partition into windows."""
    height, width = inputs.shape.height, inputs.shape.width
    require(height % WINDOW == width % WINDOW == 0, f"windows of {WINDOW}x{WINDOW}")
    swin = load("timm.models.swin_transformer")
    windows = swin.window_partition(inputs.qkv, (WINDOW, WINDOW))
    output = attend(windows.flatten(1, 2)).unflatten(1, (WINDOW, WINDOW))
    return swin.window_reverse(output, (WINDOW, WINDOW), height, width)


def run_global_attention(inputs: Inputs) -> Tensor:
    """Run attention over all pixels."""
    limit = CPU_TOKENS if inputs.value.device.type == "cpu" else math.inf
    require(inputs.shape.height * inputs.shape.width <= limit, f"over {limit} tokens")
    return attend(inputs.qkv.flatten(1, 2)).view(inputs.value.shape)


LEAVES = ("value", "offset_mask")
REFERENCE = Competitor(lambda inputs: run_reference("dcnv4", *inputs.arguments), LEAVES)
Shape.references = [REFERENCE]
Shape.competitors = {
    "ops_dcnv4": Competitor(lambda inputs: dcnv4(*inputs.arguments), LEAVES),
    "triton": Competitor(lambda inputs: run_triton("dcnv4", *inputs.arguments), LEAVES),
    "reference": REFERENCE,
    "grid_sample": Competitor(run_grid_sample, LEAVES),
    "tuned grid_sample": Competitor(run_tuned_grid_sample, LEAVES),
    "deform_conv2d": Competitor(run_deform_conv2d, LEAVES),
    "published DCNv4": Competitor(run_published, LEAVES),
    "depth-wise 7x7": Competitor(run_depthwise, ("value", "weight"), baseline=True),
    "window attention": Competitor(run_window_attention, ("qkv",), baseline=True),
    "global attention": Competitor(run_global_attention, ("qkv",), baseline=True),
}
