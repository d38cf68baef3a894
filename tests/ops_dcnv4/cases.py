"""Inputs for DCNv4, and functions that run the operator and its reference on them."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ops_dcnv4 import dcnv4, output_size, reference

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Parameters(NamedTuple):
    """The operator's parameters in the order of its schema."""

    kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 2
    offset_scale: float = 1.0
    remove_center: bool = False

    @property
    def taps(self) -> int:
        return math.prod(self.kernel_size) - self.remove_center


VARIED = {
    "default": Parameters(),
    "strided": Parameters(stride=(2, 2), offset_scale=0.5),
    "even": Parameters(kernel_size=(2, 4), padding=(0, 2), groups=1),
    "remove_center": Parameters(
        stride=(1, 3), dilation=(2, 1), offset_scale=2.0, remove_center=True
    ),
}


class Tensors(NamedTuple):
    value: Tensor
    offset_mask: Tensor
    grad_output: Tensor

    def to(self, dtype_or_device) -> "Tensors":
        return Tensors(*(tensor.to(dtype_or_device) for tensor in self))


def random_tensors(
    p: Parameters,
    batch=2,
    size=(7, 6),
    group_channels=5,
    padding_channels=3,
    spread=1.0,
    steps_per_pixel=None,
    seed=0,
) -> Tensors:
    """Draw normally distributed float64 tensors; offsets in steps are exact in float32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    channels, out = p.groups * group_channels, output_size(size, *p[:4])
    packed = normal(batch, *out, p.groups, 3 * p.taps)
    offsets = packed[..., : 2 * p.taps]
    offsets *= spread
    if steps_per_pixel is not None:
        offsets.mul_(steps_per_pixel).round_().div_(steps_per_pixel)
    return Tensors(
        normal(batch, *size, channels),
        torch.cat((packed.flatten(3), normal(batch, *out, padding_channels)), dim=-1),
        normal(batch, *out, channels),
    )


def small_cases() -> Iterator[tuple[Parameters, Tensors]]:
    """Yield inputs small enough for memory checkers that reach all paths through the kernels."""
    parameters = (
        Parameters(groups=3),
        Parameters(groups=1, stride=(2, 2), remove_center=True),
        Parameters(groups=9, kernel_size=(1, 2), padding=(0, 1)),
    )
    sizes, group_channels = ((5, 6), (1, 9), (1, 1)), (3, 16, 20, 40)
    for p, size, channels, dtype in itertools.product(parameters, sizes, group_channels, DTYPES):
        tensors = random_tensors(p, 1, size, channels, padding_channels=0, spread=3.0)
        yield p, tensors.to(dtype)


class Result(NamedTuple):
    output: Tensor
    grad_value: Tensor
    grad_offset_mask: Tensor


Run = Callable[[Tensors, Parameters], Result]


def run_operator(tensors: Tensors, p: Parameters, device: str = "cpu") -> Result:
    """Return output and gradients on the CPU, computed on the device."""
    value, offset_mask, grad_output = tensors.to(device)
    inputs = value.detach().requires_grad_(), offset_mask.detach().requires_grad_()
    output = dcnv4(*inputs, *p)
    grads = torch.autograd.grad(output, inputs, grad_output)
    return Result(*(tensor.detach().cpu() for tensor in (output, *grads)))


def run_reference(tensors: Tensors, p: Parameters, module=reference) -> Result:
    """Return output and gradients, computed by a module with the reference's functions."""
    value, offset_mask, grad_output = tensors
    output = module.dcnv4(value, offset_mask, *p)
    return Result(output, *module.dcnv4_backward(grad_output, value, offset_mask, *p))


def run_exactly(tensors: Tensors, p: Parameters) -> Result:
    return run_reference(tensors.to(torch.float64), p)


def assert_equal(actual: Result, expected: Result) -> None:
    """Assert equality bit for bit."""
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def assert_rounded_once(actual: Tensor, expected: Tensor) -> None:
    """Assert that `actual` was computed in float32 and rounded once to its dtype."""
    torch.testing.assert_close(
        actual.double(),
        expected,
        rtol=0.51 * torch.finfo(actual.dtype).eps,
        atol=2e-6 * expected.abs().max().item(),
    )
