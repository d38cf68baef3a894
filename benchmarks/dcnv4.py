"""Shapes, inputs, implementations and yardsticks for the benchmark of DCNv4."""

import argparse
import functools
import importlib
import math
import re
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import deform_conv2d

from benchmarks.competitors import Competitor, away_from_integers, by_image
from ops_dcnv4 import dcnv4, reference

OURS = "ops_dcnv4"
TAPS, WINDOW, HEAD_CHANNELS = 9, 7, 32
CPU_TOKENS = 4096  # limit for global attention on the CPU, which is too slow with more


class Shape(NamedTuple):
    """Size of a call of DCNv4."""

    n: int
    height: int
    width: int
    channels: int
    group_channels: int = 16

    form = "NxHxWxC or NxHxWxC/D, such as 64x56x56x128/32"
    ours = OURS

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Parse a shape; return None if `text` has another form."""
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3}(/[1-9]\d*)?", text):
            return None
        shape = cls(*map(int, re.split("[x/]", text)))
        if shape.channels % shape.group_channels:
            raise argparse.ArgumentTypeError(
                f"{text!r} must have a D that divides C, got D = {shape.group_channels} "
                f"and C = {shape.channels}"
            )
        return shape

    def __str__(self) -> str:
        return "x".join(map(str, self[:4])) + f"/{self.group_channels}"

    @property
    def competitors(self) -> dict[str, Competitor]:
        """Return the implementations to compare, by name."""
        return COMPETITORS

    @property
    def groups(self) -> int:
        """Return the number of channel groups."""
        return self.channels // self.group_channels

    @property
    def offset_mask_channels(self) -> int:
        """Return the channels of offset_mask, padded to a multiple of 8 as in the DCNv4 layer."""
        return math.ceil(3 * TAPS * self.groups / 8) * 8

    def bytes_touched(self, dtype: torch.dtype) -> dict[str, int]:
        """Return the bytes per pass if each tensor and gradient is accessed once."""
        pixel, packed = self.channels, self.offset_mask_channels
        elements = {"forward": 2 * pixel + packed, "backward": 3 * pixel + 2 * packed}
        elements["forward+backward"] = sum(elements.values())
        scale = self.n * self.height * self.width * dtype.itemsize
        return {name: scale * count for name, count in elements.items()}

    def bytes_gathered(self, dtype: torch.dtype) -> int:
        """Return the bytes that the forward pass gathers from value: four pixels per point."""
        return self.n * self.height * self.width * self.channels * 4 * TAPS * dtype.itemsize

    def random_inputs(self, dtype: torch.dtype, device: torch.device) -> "Inputs":
        """Return random inputs that require gradients."""
        size, channels = self[:3], self.channels
        options = {"dtype": dtype, "device": device}
        packed = torch.randn(*size, self.groups, 3 * TAPS, device=device)
        packed[..., : 2 * TAPS] = away_from_integers(0.5 * packed[..., : 2 * TAPS])
        packed = packed.flatten(3).to(dtype)
        leaves = (
            torch.randn(*size, channels, **options),
            F.pad(packed, (0, self.offset_mask_channels - packed.shape[3])),
            torch.randn(*size, 3 * channels, **options),
            torch.randn(channels, 1, WINDOW, WINDOW, **options) / WINDOW,
        )
        grad_output = torch.randn(*size, channels, **options)
        return Inputs(*(leaf.requires_grad_() for leaf in leaves), grad_output, self)

    def expected_results(self, inputs: "Inputs") -> dict[str, Tensor]:
        """Return output and gradients of the reference."""

        def of_image(grad_output: Tensor, *image: Tensor) -> dict[str, Tensor]:
            grads = reference.dcnv4_backward(grad_output, *image, *inputs.parameters)
            return {
                "output": reference.dcnv4(*image, *inputs.parameters),
                "value": grads[0],
                "offset_mask": grads[1][..., : 3 * TAPS * self.groups],
            }

        leaves = inputs.value.detach(), inputs.offset_mask.detach()
        return by_image(of_image, inputs.grad_output, *leaves)


class Inputs(NamedTuple):
    """Inputs of all implementations and yardsticks."""

    value: Tensor  # (N, H, W, C)
    offset_mask: Tensor  # (N, H, W, 3 * groups * TAPS, padded)
    qkv: Tensor  # (N, H, W, 3 * C), for attention
    weight: Tensor  # (C, 1, 7, 7), for the depth-wise convolution
    grad_output: Tensor  # (N, H, W, C)
    shape: Shape

    @property
    def parameters(self) -> tuple:
        """Return the operator's other arguments: a 3x3 window that keeps the image size."""
        return (3, 3), (1, 1), (1, 1), (1, 1), self.shape.groups, 1.0, False

    @property
    def packed(self) -> Tensor:
        """Return offsets and scalars of each group, (N, H, W, groups, 3 * TAPS)."""
        used = self.offset_mask[..., : 3 * TAPS * self.shape.groups]
        return used.unflatten(3, (self.shape.groups, -1))


def run_ops_dcnv4(inputs: Inputs) -> Tensor:
    """Run :func:`ops_dcnv4.dcnv4`."""
    return dcnv4(inputs.value, inputs.offset_mask, *inputs.parameters)


class Reference(torch.autograd.Function):
    """The reference with its explicit backward pass."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, offset_mask: Tensor, *parameters: Any) -> Tensor:
        """Compute the output."""
        ctx.save_for_backward(value, offset_mask)
        ctx.parameters = parameters
        return reference.dcnv4(value, offset_mask, *parameters)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients."""
        grads = reference.dcnv4_backward(grad_output, *ctx.saved_tensors, *ctx.parameters)
        return *grads, *(None for _ in ctx.parameters)


def run_reference(inputs: Inputs) -> Tensor:
    """Run the reference."""
    return Reference.apply(inputs.value, inputs.offset_mask, *inputs.parameters)


def images_of_groups(inputs: Inputs, dtype: torch.dtype) -> Tensor:
    """Return the groups of value as separate images, (N * groups, D, H, W)."""
    value = inputs.value.to(dtype).unflatten(3, (inputs.shape.groups, -1))
    return value.permute(0, 3, 4, 1, 2).flatten(0, 1)


def run_grid_sample(inputs: Inputs) -> Tensor:
    """Run the usual implementation without a kernel, around `grid_sample`.

    Like the fallbacks of DCNv3 and Deformable DETR, it has one row of the grid per output pixel.
    16-bit inputs are sampled in float32.
    """
    n, height, width, _, _ = inputs.shape
    dtype = reference.compute_dtype(inputs.value.dtype)
    x, y, modulation = reference.sampling_points(inputs.offset_mask.to(dtype), *inputs.parameters)
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), dim=-1)
    grid = grid.flatten(1, 2).transpose(1, 2).flatten(0, 1)  # (N * groups, H * W, TAPS, 2)
    samples = F.grid_sample(images_of_groups(inputs, dtype), grid, align_corners=False)
    modulation = modulation.flatten(1, 2).transpose(1, 2).flatten(0, 1).unsqueeze(1)
    output = (samples * modulation).sum(-1).unflatten(0, (n, -1)).flatten(1, 2)
    return output.transpose(1, 2).unflatten(1, (height, width)).to(inputs.value.dtype)


@functools.cache
def regular_grid(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the normalised positions (x, y) of the taps without offsets, (H, TAPS, W, 2)."""
    rows, columns = (torch.arange(n, dtype=dtype, device=device) for n in (height, width))
    column_steps, row_steps = torch.cartesian_prod(*[torch.arange(-1, 2, device=device)] * 2).T
    x = (2 * (columns + column_steps[:, None]) + 1) / width - 1
    y = (2 * (rows[:, None] + row_steps) + 1) / height - 1
    return torch.stack(torch.broadcast_tensors(x, y[..., None]), dim=-1)


def run_tuned_grid_sample(inputs: Inputs) -> Tensor:
    """Run an optimised implementation around `grid_sample`.

    The regular grid is cached, and the grid is ordered by row, tap and column, so that neighbours
    in memory are neighbours in the image.
    """
    n, height, width, _, _ = inputs.shape
    dtype, device = reference.compute_dtype(inputs.value.dtype), inputs.value.device
    packed = inputs.packed.to(dtype).permute(0, 3, 1, 4, 2)  # (N, groups, H, 3 * TAPS, W)
    offsets, modulation = packed.split([2 * TAPS, TAPS], dim=3)
    to_normalised = torch.tensor([2 / width, 2 / height], dtype=dtype, device=device)
    offsets = offsets.unflatten(3, (TAPS, 2)).transpose(4, 5) * to_normalised
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
    output = deform_conv2d(
        inputs.value.permute(0, 3, 1, 2),
        offsets.flatten(1, 4),
        inputs.value.new_ones(inputs.shape.channels, 1, 3, 3),
        padding=1,
        mask=modulation.flatten(1, 3),
    )
    return output.permute(0, 2, 3, 1)


def published_function() -> type[torch.autograd.Function] | None:
    """Return the operator of the published package, or None if it cannot be imported."""
    try:
        return importlib.import_module("DCNv4.functions").DCNv4Function
    except (ImportError, OSError, AttributeError):
        return None


def run_published(inputs: Inputs) -> Tensor:
    """Run the operator of the published package."""
    pairs, shape = (3, 3, 1, 1, 1, 1, 1, 1), inputs.shape
    parameters = (*pairs, shape.groups, shape.group_channels, 1.0, 256, 0)
    return published_function().apply(inputs.value, inputs.offset_mask, *parameters)


def run_depthwise(inputs: Inputs) -> Tensor:
    """Run a 7x7 depth-wise convolution."""
    image = inputs.value.permute(0, 3, 1, 2)  # channels-last memory
    output = F.conv2d(image, inputs.weight, padding=WINDOW // 2, groups=inputs.shape.channels)
    return output.permute(0, 2, 3, 1)


def run_window_attention(inputs: Inputs) -> Tensor:
    """Run Swin's window attention, including the partition into windows."""
    n, height, width, _, _ = inputs.shape
    windows = inputs.qkv.view(
        n, height // WINDOW, WINDOW, width // WINDOW, WINDOW, 3, -1, HEAD_CHANNELS
    )
    tokens = windows.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).flatten(1, 3)
    output = F.scaled_dot_product_attention(*tokens).unflatten(2, (WINDOW, WINDOW))
    output = output.unflatten(0, (n, height // WINDOW, width // WINDOW))
    return output.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4).flatten(1, 2)


def run_global_attention(inputs: Inputs) -> Tensor:
    """Run attention over all pixels."""
    tokens = inputs.qkv.flatten(1, 2).unflatten(2, (3, -1, HEAD_CHANNELS)).permute(2, 0, 3, 1, 4)
    output = F.scaled_dot_product_attention(*tokens)
    return output.transpose(1, 2).flatten(2).view(inputs.value.shape)


def why_not_published(inputs: Inputs) -> str | None:
    """Return why the published package is not available, or None if it is."""
    return None if published_function() else "not installed"


def why_not_attention(inputs: Inputs) -> str | None:
    """Return why attention cannot run on the inputs, or None if it can."""
    return "heads of 32 channels" if inputs.shape.channels % HEAD_CHANNELS else None


def why_not_window(inputs: Inputs) -> str | None:
    """Return why window attention cannot run on the inputs, or None if it can."""
    uneven = inputs.shape.height % WINDOW or inputs.shape.width % WINDOW
    return "windows of 7x7" if uneven else why_not_attention(inputs)


def why_not_global(inputs: Inputs) -> str | None:
    """Return why global attention cannot run on the inputs, or None if it can."""
    tokens = inputs.shape.height * inputs.shape.width
    if inputs.value.device.type == "cpu" and tokens > CPU_TOKENS:
        return f"over {CPU_TOKENS} tokens"
    return why_not_attention(inputs)


LEAVES = ("value", "offset_mask")
COMPETITORS = {
    OURS: Competitor(run_ops_dcnv4, LEAVES),
    "reference": Competitor(run_reference, LEAVES),
    "grid_sample": Competitor(run_grid_sample, LEAVES),
    "tuned grid_sample": Competitor(run_tuned_grid_sample, LEAVES),
    "deform_conv2d": Competitor(run_deform_conv2d, LEAVES),
    "published DCNv4": Competitor(run_published, LEAVES, why_not_published),
    "depth-wise 7x7": Competitor(run_depthwise, ("value", "weight"), yardstick=True),
    "window attention": Competitor(run_window_attention, ("qkv",), why_not_window, yardstick=True),
    "global attention": Competitor(run_global_attention, ("qkv",), why_not_global, yardstick=True),
}
