"""What the operator benchmark asks of an operator: its shapes, with inputs and competitors."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

# Of outputs and gradients, relative to the largest expected magnitude.
TOLERANCES = {"float32": 1e-4, "float64": 1e-10, "float16": 1e-2, "bfloat16": 5e-2}


class Competitor(NamedTuple):
    run: Callable[[Any], Tensor]  # of inputs
    leaves: tuple[str, ...]  # the inputs that get a gradient
    why_not: Callable[[Any], str | None] = lambda inputs: None
    yardstick: bool = False  # computes something else
    tolerances: dict[str, float] = TOLERANCES


class Inputs(Protocol):
    """A named tuple of these and of the leaves."""

    value: Tensor  # tells dtype and device
    grad_output: Tensor
    shape: "Shape"


class Shape(Protocol):
    """A size of one operator; as a string it is what `parse` reads."""

    form: str  # how to write it
    ours: str  # one of the competitors, beside which the others are put

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """None where `text` does not look like a shape of this kind."""

    @property
    def competitors(self) -> dict[str, Competitor]: ...

    def random_inputs(self, dtype: torch.dtype, device: torch.device) -> Inputs: ...

    def expected_results(self, inputs: Inputs) -> dict[str, Tensor]:
        """The output, by that name, and the gradient of each leaf, up to its padding."""

    def bytes_touched(self, dtype: torch.dtype) -> dict[str, int]:
        """By each pass, if it touches every tensor and gradient once."""

    def bytes_gathered(self, dtype: torch.dtype) -> int:
        """By the forward, from value: four pixels for each point."""


def away_from_integers(positions: Tensor) -> Tensor:
    """At least a tenth away from where the gradient jumps and rounding decides its side."""
    pixels = positions.floor()
    return pixels + 0.1 + 0.8 * (positions - pixels)


def by_image(compute: Callable[..., dict[str, Tensor]], *tensors: Tensor) -> dict[str, Tensor]:
    """Computes one image at a time, which saves memory."""
    images = [compute(*image) for image in zip(*(t.split(1) for t in tensors), strict=True)]
    return {name: torch.cat([image[name] for image in images]) for name in images[0]}
