"""Inputs for deformable attention, and functions that run the operators on them.

Both forms take the same inputs: the weights of the "split" form, which has separate tensors for
locations and weights, are the logits of the fused form.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ops_dcnv4 import flash_deform_attn, ms_deform_attn, reference

FORMS = ("split", "fused")
OPERATORS = [
    f"{name}{suffix}"
    for name in ("ms_deform_attn", "flash_deform_attn")
    for suffix in ("", "_backward")
]
Sizes = tuple[tuple[int, int], ...]


class Inputs(NamedTuple):
    value: Tensor  # (N, S, M, D)
    spatial_shapes: Tensor  # (L, 2)
    level_start_index: Tensor  # (L,)
    locations: Tensor  # (N, Lq, M, L, K, 2)
    weights: Tensor  # (N, Lq, M, L, K), or logits
    grad_output: Tensor  # (N, Lq, M * D)

    def to(self, dtype: torch.dtype, points: torch.dtype | None = None) -> "Inputs":
        """Convert to `dtype`, and locations and weights to `points` if given."""
        points = points or dtype
        value, shapes, start, locations, weights, grad = self
        return Inputs(
            value.to(dtype), shapes, start, locations.to(points), weights.to(points), grad.to(dtype)
        )

    def on(self, device: str) -> "Inputs":
        return Inputs(*(tensor.to(device) for tensor in self))

    def of_image(self, i: int) -> "Inputs":
        return Inputs(*(t[i : i + 1] if t.is_floating_point() else t for t in self))


class Result(NamedTuple):
    output: Tensor
    grad_value: Tensor
    grad_locations: Tensor
    grad_weights: Tensor


Run = Callable[[Inputs, str], Result]


def random_inputs(
    shapes: Sizes = ((5, 7), (3, 4)),
    points: int = 3,
    heads: int = 2,
    head_channels: int = 5,
    queries: int = 6,
    batch: int = 2,
    spread: float = 1.0,
    steps: int | None = None,
    seed: int = 0,
) -> Inputs:
    """Draw normally distributed float64 tensors, with locations around the image centers.

    With `steps`, a power of two, locations are multiples of 1 / steps: exact in any dtype.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    spatial_shapes = torch.tensor(shapes, dtype=torch.int64).view(-1, 2)
    pixels = spatial_shapes.prod(1)
    locations = 0.5 + 0.4 * spread * normal(batch, queries, heads, len(shapes), points, 2)
    if steps is not None:
        locations = (locations * steps).round() / steps
    return Inputs(
        normal(batch, int(pixels.sum()), heads, head_channels),
        spatial_shapes,
        pixels.cumsum(0) - pixels,
        locations,
        normal(batch, queries, heads, len(shapes), points),
        normal(batch, queries, heads * head_channels),
    )


def pack(inputs: Inputs) -> Tensor:
    """Return locations and weights as sampling_loc_attn."""
    return torch.cat((inputs.locations.flatten(3), inputs.weights.flatten(3)), dim=-1)


def unpack(packed: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    locations, weights = packed.split([packed.shape[-1] // 3 * 2, packed.shape[-1] // 3], dim=-1)
    return locations.reshape(inputs.locations.shape), weights.reshape(inputs.weights.shape)


def call(inputs: Inputs, form: str) -> Tensor:
    """Call the public function of a form."""
    value, shapes, start, locations, weights, _ = inputs
    if form == "split":
        return ms_deform_attn(value, shapes, start, locations, weights)
    return flash_deform_attn(value, shapes, start, pack(inputs), locations.shape[4])


def run_operator(inputs: Inputs, form: str, device: str = "cpu") -> Result:
    """Return output and gradients on the CPU, computed on the device."""
    inputs = inputs.on(device)
    leaves = [t.detach().requires_grad_() for t in (inputs.value, inputs.locations, inputs.weights)]
    value, locations, weights = leaves
    output = call(inputs._replace(value=value, locations=locations, weights=weights), form)
    grads = torch.autograd.grad(output, leaves, inputs.grad_output)
    return Result(*(tensor.detach().cpu() for tensor in (output, *grads)))


def run_reference(inputs: Inputs, form: str, module=reference, **options: bool) -> Result:
    """Return output and gradients, computed by a module with the reference's functions.

    The options are passed on to the function that computes the gradients.
    """
    value, shapes, start, locations, weights, grad_output = inputs
    levels = (value, shapes, start)
    if form == "split":
        points = (locations, weights)
        grads = module.ms_deform_attn_backward(grad_output, *levels, *points, **options)
        return Result(module.ms_deform_attn(*levels, *points), *grads)
    points = (pack(inputs), locations.shape[4])
    grad_value, grad_packed = module.flash_deform_attn_backward(
        grad_output, *levels, *points, **options
    )
    output = module.flash_deform_attn(*levels, *points)
    return Result(output, grad_value, *unpack(grad_packed, inputs))


def run_exactly(inputs: Inputs, form: str) -> Result:
    return run_reference(inputs.to(torch.float64), form)
