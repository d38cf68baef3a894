"""Inputs for the operators of deformable attention, and how they are run in both of their forms."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ops_dcnv4 import reference
from tests.ops_dcnv4.cases import DTYPES

HALVES = (torch.float16, torch.bfloat16)
# Of value, and of locations and weights.
DTYPE_PAIRS = [*zip(DTYPES, DTYPES, strict=True), *((half, torch.float32) for half in HALVES)]
# Powers of two: coordinates in steps are exact, however locations are rounded.
SIZES = ((4, 8), (4, 4), (2, 2), (1, 2))


class Tensors(NamedTuple):
    """The arguments of ms_deform_attn, in the order of its schema, and a gradient."""

    value: Tensor
    spatial_shapes: Tensor
    level_start_index: Tensor
    sampling_locations: Tensor
    attention_weights: Tensor
    grad_output: Tensor

    def astype(self, dtype: torch.dtype, points: torch.dtype | None = None) -> "Tensors":
        points = points or dtype
        return Tensors(
            self.value.to(dtype),
            *self[1:3],
            *(tensor.to(points) for tensor in self[3:5]),
            self.grad_output.to(dtype),
        )

    def to(self, device: str) -> "Tensors":
        return Tensors(*(tensor.to(device) for tensor in self))

    def images(self, start: int, stop: int) -> "Tensors":
        return Tensors(
            *(
                t[start:stop] if t.is_floating_point() else t  # the levels are those of all images
                for t in self
            )
        )

    @property
    def packed(self) -> tuple[Tensor, int]:
        """The last arguments of flash_deform_attn; the weights are taken for logits."""
        tensors = self.sampling_locations, self.attention_weights
        return torch.cat([t.flatten(3) for t in tensors], dim=-1), tensors[0].shape[4]


def random_tensors(
    heads=2,
    head_channels=5,
    points=3,
    sizes=SIZES,
    batch=1,
    queries=17,
    spread=1.5,
    steps_per_pixel=64,
    seed=0,
) -> Tensors:
    """Normally distributed, in float64; points in steps, some of them outside of the images."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shapes = torch.tensor(sizes)
    pixels = shapes.prod(1)
    grid = shapes.flip(1).to(torch.float64)[:, None]  # (L, 1, 2): W, H
    uniform = torch.rand(
        (batch, queries, heads, len(sizes), points, 2), generator=generator, dtype=torch.float64
    )
    locations = 0.5 + spread * (uniform - 0.5)
    return Tensors(
        normal(batch, int(pixels.sum()), heads, head_channels),
        shapes,
        pixels.cumsum(0) - pixels,
        (locations * grid * steps_per_pixel).round() / steps_per_pixel / grid,
        normal(batch, queries, heads, len(sizes), points),
        normal(batch, queries, heads * head_channels),
    )


class Result(NamedTuple):
    output: Tensor
    fused_output: Tensor
    grad_value: Tensor
    fused_grad_value: Tensor
    grad_locations: Tensor
    grad_weights: Tensor
    grad_packed: Tensor


def run_operators(operators, tensors: Tensors) -> Result:
    """Both forms by a namespace of torch.ops, or by the reference."""
    *inputs, grad_output = tensors
    fused_inputs = *inputs[:3], *tensors.packed
    grad_value, grad_locations, grad_weights = operators.ms_deform_attn_backward(
        grad_output, *inputs
    )
    fused_grads = operators.flash_deform_attn_backward(grad_output, *fused_inputs)
    return Result(
        operators.ms_deform_attn(*inputs),
        operators.flash_deform_attn(*fused_inputs),
        grad_value,
        fused_grads[0],
        grad_locations,
        grad_weights,
        fused_grads[1],
    )


def run_exactly(tensors: Tensors) -> Result:
    return run_operators(reference, tensors.astype(torch.float64))


def small_cases() -> Iterator[Tensors]:
    """What checkers of memory accesses can bear: few threads, on all paths through the kernels."""
    shapes = (
        {"heads": 3, "head_channels": 3, "points": 2},
        {"heads": 3, "head_channels": 16, "points": 4},
        {"heads": 1, "head_channels": 32, "points": 4, "queries": 1},
        {"heads": 9, "head_channels": 40, "points": 1, "sizes": ((1, 1), (3, 1))},
    )
    for sizes, dtypes in itertools.product(shapes, DTYPE_PAIRS):
        yield random_tensors(**sizes, spread=2.0).astype(*dtypes)


def outside_of_value() -> Iterator[tuple[Tensor, Tensor]]:
    """Sizes and starts of levels, one of which does not lie within the pixels of value."""
    tensors = random_tensors()
    shapes, starts, pixels = *tensors[1:3], tensors.value.shape[1]
    for level, (height, width) in enumerate(SIZES):
        for size in ((0, width), (height, -1), (pixels, 2), (2**32 + height, width), (2**62, 4)):
            changed = shapes.clone()
            changed[level] = torch.tensor(size)
            yield changed, starts
        for start in (-1, pixels, pixels - height * width + 1, 2**32, -(2**63)):
            changed = starts.clone()
            changed[level] = start
            yield shapes, changed
