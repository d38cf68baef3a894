"""Inputs for deformable attention that reveal accesses outside of tensors."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from tests.ops_dcnv4.attention_cases import Inputs, random_inputs
from tests.ops_dcnv4.cases import DTYPES

HALVES = (torch.float16, torch.bfloat16)
# Pairs of dtypes: value; locations and weights.
DTYPE_PAIRS = [*zip(DTYPES, DTYPES, strict=True), *((half, torch.float32) for half in HALVES)]
FOUR_LEVELS = ((4, 5), (3, 4), (2, 2), (1, 2))


def small_cases() -> Iterator[Inputs]:
    """Yield inputs with few threads, for slow memory checkers, on all paths through the kernels."""
    sizes = (
        {"heads": 3, "head_channels": 3, "points": 2, "queries": 17},
        {"heads": 3, "head_channels": 16, "points": 4, "queries": 17},
        {"heads": 1, "head_channels": 32, "points": 4, "queries": 1},
        {"heads": 9, "head_channels": 40, "points": 1, "shapes": ((1, 1), (3, 1))},
    )
    for case, dtypes in itertools.product(sizes, DTYPE_PAIRS):
        inputs = {"shapes": FOUR_LEVELS, "batch": 1, "spread": 2.0} | case
        yield random_inputs(**inputs).to(*dtypes)


def levels_outside_of_value() -> Iterator[tuple[Tensor, Tensor]]:
    """Yield spatial shapes and start indices with one level that exceeds the pixels of value."""
    value, shapes, starts, *_ = random_inputs(FOUR_LEVELS)
    pixels = value.shape[1]
    for level, (height, width) in enumerate(FOUR_LEVELS):
        for size in ((0, width), (height, -1), (pixels, 2), (2**32 + height, width), (2**62, 4)):
            changed = shapes.clone()
            changed[level] = torch.tensor(size)
            yield changed, starts
        for start in (-1, pixels, pixels - height * width + 1, 2**32, -(2**63)):
            changed = starts.clone()
            changed[level] = start
            yield shapes, changed
