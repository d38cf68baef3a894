"""Common parts of the operator benchmarks: competitors, the reference, and their inputs."""

import dataclasses
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ops_dcnv4 import reference
from ops_dcnv4.backends import has_triton

# Tolerances of outputs and gradients, relative to the largest expected magnitude.
TOLERANCES = {"float32": 1e-4, "float64": 1e-10, "float16": 1e-2, "bfloat16": 5e-2}


class Unavailable(Exception):
    """Raised by a competitor that cannot run here or on the inputs; the message is the reason."""


class Competitor(NamedTuple):
    """An implementation to compare."""

    run: Callable[[Any], Tensor]  # computes the output from the inputs
    leaves: tuple[str, ...]  # names of the inputs that receive a gradient
    baseline: bool = False  # computes something else, so that its results are not verified
    tolerances: dict[str, float] = TOLERANCES

    def gradients(self, inputs: Any, output: Tensor, retain_graph: bool = False) -> tuple:
        """Return the gradients of the leaves."""
        leaves = [getattr(inputs, name) for name in self.leaves]
        return torch.autograd.grad(output, leaves, inputs.grad_output, retain_graph=retain_graph)


def require(condition: bool, reason: str) -> None:
    """Raise Unavailable with the reason unless the condition holds."""
    if not condition:
        raise Unavailable(reason)


def load(module: str) -> ModuleType:
    """Import a module of an optional package."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise Unavailable("not installed") from error


class Explicit(torch.autograd.Function):
    """An operator of a Python module with its explicit backward pass."""

    @staticmethod
    def forward(ctx: Any, module: ModuleType, operator: str, *arguments: Any) -> Tensor:
        """Compute the output of the operator of that name."""
        ctx.module, ctx.operator, ctx.arguments = module, operator, arguments
        return getattr(module, operator)(*arguments)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the floating-point tensors."""
        backward = getattr(ctx.module, f"{ctx.operator}_backward")
        grads = iter(backward(*grad_outputs, *ctx.arguments))
        floating = [isinstance(a, Tensor) and a.is_floating_point() for a in ctx.arguments]
        return None, None, *(next(grads) if is_leaf else None for is_leaf in floating)


def run_reference(operator: str, *arguments: Any) -> Tensor:
    """Run an operator of :mod:`ops_dcnv4.reference`."""
    return Explicit.apply(reference, operator, *arguments)


def run_triton(operator: str, *arguments: Any) -> Tensor:
    """Run a Triton kernel, without the overhead of selecting it for each call."""
    require(arguments[0].device.type == "cuda", "CUDA only")
    require(has_triton(), "not installed")
    return Explicit.apply(load("ops_dcnv4.triton_kernels"), operator, *arguments)


def expected_results(inputs: Any) -> dict[str, Tensor]:
    """Return "output" and the gradient of each leaf by the references, without padding.

    Images are computed one at a time, which saves memory.
    """
    expected = {}
    for competitor in inputs.shape.references:
        names = [*competitor.leaves, "grad_output"]
        images = []
        for image in zip(*(getattr(inputs, name).split(1) for name in names), strict=True):
            one = dataclasses.replace(inputs, **dict(zip(names, image, strict=True)))
            output = competitor.run(one)
            images.append((output.detach(), *competitor.gradients(one, output)))
        results = zip(*images, strict=True)
        for name, parts in zip(("output", *competitor.leaves), results, strict=True):
            expected[name] = torch.cat(parts)[..., : inputs.shape.used_channels.get(name)]
    return expected


def bytes_touched(inputs: Any) -> dict[str, int]:
    """Return the bytes per pass if our operator accesses each tensor and gradient once."""
    ours = next(iter(inputs.shape.competitors.values()))
    read = sum(getattr(inputs, name).nbytes for name in ours.leaves)
    output = inputs.grad_output.nbytes
    touched = {"forward": read + output, "backward": 2 * read + output}
    return touched | {"forward+backward": sum(touched.values())}


def away_from_integers(positions: Tensor) -> Tensor:
    """Move positions at least 0.1 away from integers.

    The gradient jumps at integers, where rounding would decide on which side a position is.
    """
    pixels = positions.floor()
    return pixels + 0.1 + 0.8 * (positions - pixels)
