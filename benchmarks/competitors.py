"""Interfaces of the operator benchmark: shapes, inputs and competing implementations."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

# Tolerances of outputs and gradients, relative to the largest expected magnitude.
TOLERANCES = {"float32": 1e-4, "float64": 1e-10, "float16": 1e-2, "bfloat16": 5e-2}


class Competitor(NamedTuple):
    """An implementation to compare."""

    run: Callable[[Any], Tensor]  # computes the output from the inputs
    leaves: tuple[str, ...]  # names of the inputs that receive a gradient
    why_not: Callable[[Any], str | None] = lambda inputs: None  # why it cannot run on the inputs
    yardstick: bool = False  # whether it computes something else
    tolerances: dict[str, float] = TOLERANCES


class Inputs(Protocol):
    """Inputs of all implementations: a named tuple of these fields and the leaves."""

    value: Tensor  # determines dtype and device
    grad_output: Tensor
    shape: "Shape"


class Shape(Protocol):
    """Size of a call of one operator; `str` returns what `parse` accepts."""

    form: str  # description of what `parse` accepts
    ours: str  # the competitor that the others are compared with

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Parse a shape; return None if `text` has another form."""

    @property
    def competitors(self) -> dict[str, Competitor]:
        """Return the implementations to compare, by name."""
        ...

    def random_inputs(self, dtype: torch.dtype, device: torch.device) -> Inputs:
        """Return random inputs that require gradients."""
        ...

    def expected_results(self, inputs: Inputs) -> dict[str, Tensor]:
        """Return "output" and the gradient of each leaf, by name and without padding."""

    def bytes_touched(self, dtype: torch.dtype) -> dict[str, int]:
        """Return the bytes per pass if each tensor and gradient is accessed once."""

    def bytes_gathered(self, dtype: torch.dtype) -> int:
        """Return the bytes that the forward pass gathers from value: four pixels per point."""


def away_from_integers(positions: Tensor) -> Tensor:
    """Move positions at least 0.1 away from integers.

    The gradient jumps at integers, where rounding would decide on which side a position is.
    """
    pixels = positions.floor()
    return pixels + 0.1 + 0.8 * (positions - pixels)


def by_image(compute: Callable[..., dict[str, Tensor]], *tensors: Tensor) -> dict[str, Tensor]:
    """Compute results one image at a time, which saves memory."""
    images = [compute(*image) for image in zip(*(t.split(1) for t in tensors), strict=True)]
    return {name: torch.cat([image[name] for image in images]) for name in images[0]}
