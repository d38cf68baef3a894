"""Run the CUDA kernels' machine code, check the results, and count instructions.

python -m tests.sass [WORD ...] compiles the kernels for sm_90 (a few seconds each), runs them on
small inputs on an emulator, compares the results with the float64 reference, and prints a table.
With words, only kernels whose names contain all of them run; without, so do more parameters. The
first column of numbers is for warps that sample no pixel outside of the image, the second for tiles
at its border. A second table, which the word `widths` selects, is for other group widths.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.ops_dcnv4 import attention_cases
from tests.ops_dcnv4.attention_cases import FORMS, random_inputs
from tests.ops_dcnv4.cases import Parameters, random_tensors, run_exactly
from tests.sass import compiler
from tests.sass.device import OPERATORS, Launch, load, machine_code

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TILE = 4  # pixels
SIZE = 3 * TILE  # of images: nine tiles, one of them inside
CENTER = 4  # index of the tile inside
TILES = 14  # along an axis of the image for which the mean is given
LEVELS = ((12, 16), (6, 8), (4, 5), (3, 4))
PUBLISHED_WIDTH, WIDTHS = 16, (5, 6, 12, 20, 24)  # channels per group
HEADER = (
    "kernel",
    "interior",
    "rim",
    f"mean over {TILES * TILE} x {TILES * TILE}",
    "sectors of reductions",
)


@dataclass
class Counts:
    """Instructions per warp, and sectors that reductions add to in the interior."""

    interior: float
    rim: float
    mean: float
    sectors: float


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def check(what: str, actual: Tensor, expected: Tensor, relative: float) -> None:
    """Exit with an error unless results are close, relative to the largest number.

    The tests of the kernels check the exact error bounds, on the emulator of CUDA's C++.
    """
    error = ((actual.double() - expected).abs().max() / expected.abs().max()).item()
    if not error <= relative:  # also if it is NaN
        sys.exit(f"{what}: the error is {error:.1e}, accepted is {relative:.1e}")


def tolerance(dtype: torch.dtype) -> float:
    return 4 * torch.finfo(dtype).eps


def count_windows(launch: Launch) -> Counts:
    """Weight the tiles of a small image as those of the large one."""
    across = SIZE // TILE
    instructions: dict[int, list[float]] = {0: [], 1: [], 2: []}  # by the sides at the rim
    sectors: list[float] = []  # in the interior
    for (tile, _, _), block in launch.blocks.items():
        sides = sum(place in (0, across - 1) for place in divmod(tile, across))
        instructions[sides].append(block.instructions.total() / block.warps)
        if sides == 0:
            sectors.append(block.sectors / block.warps)
    interior, edge, corner = (sum(values) / len(values) for values in instructions.values())
    inner = TILES - 2
    rim = (inner * edge + corner) / (inner + 1)
    mean = (inner**2 * interior + 4 * (inner + 1) * rim) / TILES**2
    return Counts(interior, rim, mean, sum(sectors) / len(sectors))


def windows(dtype: torch.dtype, groups: int, group_channels: int, backward: bool) -> Launch:
    """Run DCNv4 on one image."""
    p = Parameters(groups=groups)
    tensors = random_tensors(
        p, 1, (SIZE, SIZE), group_channels, padding_channels=0, spread=0.5, steps_per_pixel=64
    ).to(dtype)
    expected = run_exactly(tensors, p)
    value, offset_mask, grad_output = (tensor.clone() for tensor in tensors)
    with machine_code() as launches:
        if backward:
            results = OPERATORS.dcnv4_backward(
                grad_output, value, offset_mask, *p, deterministic=False
            )
        else:
            results = [OPERATORS.dcnv4(value, offset_mask, *p)]
    references = expected[1:] if backward else expected[:1]
    names = ("grad_value", "grad_offset_mask") if backward else ("output",)
    for name, actual, reference in zip(names, results, references, strict=True):
        check(name, actual, reference, tolerance(dtype))
    return launches[0]


def instructions_per_channel(dtype: torch.dtype, group_channels: int, backward: bool) -> float:
    """Count the instructions for a channel of a pixel in the interior, in full blocks."""
    groups = 8 if group_channels == PUBLISHED_WIDTH else 2
    blocks = windows(dtype, groups, group_channels, backward).blocks
    interior = sum(
        block.instructions.total() for (tile, _, _), block in blocks.items() if tile == CENTER
    )
    return interior / (TILE**2 * groups * group_channels)


def attention(dtype: torch.dtype, group_channels: int, backward: bool) -> Counts:
    """Run attention on points that are inside of the levels."""
    inputs = random_inputs(LEVELS, 4, 8, group_channels, queries=16, batch=1)
    locations = 0.5 + 0.2 * torch.sin(inputs.locations)
    inputs = inputs._replace(locations=locations).to(dtype)
    exact = inputs.to(torch.float64)
    inputs = attention_cases.Inputs(*(tensor.clone() for tensor in inputs))
    expected = attention_cases.run_reference(exact, "split")
    arguments = inputs[:5]
    with machine_code() as launches:
        if backward:
            results = OPERATORS.ms_deform_attn_backward(
                inputs.grad_output, *arguments, deterministic=False
            )
        else:
            results = [OPERATORS.ms_deform_attn(*arguments)]
    references = expected[1:] if backward else expected[:1]
    names = ("grad_value", "grad_locations", "grad_weights") if backward else ("output",)
    for name, actual, reference in zip(names, results, references, strict=True):
        check(name, actual, reference, tolerance(dtype))
    # The first block also verifies the levels.
    blocks = [block for index, block in launches[0].blocks.items() if index != (0, 0, 0)]
    warps = sum(block.warps for block in blocks)
    mean = sum(block.instructions.total() for block in blocks) / warps
    return Counts(mean, mean, mean, sum(block.sectors for block in blocks) / warps)


def cases() -> Iterator[tuple[str, Callable[[], Counts]]]:
    for way in ("forward", "backward"):
        for name, dtype in DTYPES.items():
            for channels in (16, 32):
                yield (
                    f"DCNv4 {way} {name} D{channels}",
                    lambda d=dtype, c=channels, w=way: count_windows(
                        windows(d, 128 // c, c, w == "backward")
                    ),
                )
    for way in ("forward", "backward"):
        for name in ("fp16", "fp32"):
            yield (
                f"attention {way} {name} D32",
                lambda d=DTYPES[name], w=way: attention(d, 32, w == "backward"),
            )


def say_widths() -> None:
    """Print how many instructions other group widths take, relative to a published one."""
    columns = [(way, name) for way in ("forward", "backward") for name in ("fp16", "fp32")]
    say("\ninstructions per channel, relative to D16\n")
    say(f"| group width | {' | '.join(map(' '.join, columns))} |\n|{'---|' * (len(columns) + 1)}")
    numbers = {
        width: [
            instructions_per_channel(DTYPES[name], width, way == "backward")
            for way, name in columns
        ]
        for width in (PUBLISHED_WIDTH, *WIDTHS)
    }
    for width in WIDTHS:
        pairs = zip(numbers[width], numbers[PUBLISHED_WIDTH], strict=True)
        say(f"| D{width} | {' | '.join(f'{number / unit:.1f}' for number, unit in pairs)} |")


def check_options() -> None:
    """Run the specialized kernels with all parameters, on images of incomplete tiles."""
    plain = Parameters()
    inside = Parameters(groups=3, padding=(0, 0), offset_scale=0.5)
    beyond = Parameters((3, 3), (2, 1), (1, 2), (1, 2), 2, 2.0, remove_center=True)
    for (name, dtype), channels in itertools.product(DTYPES.items(), (16, 32, 64)):
        for p, size, spread in ((inside, (10, 9), 0.5), (beyond, (11, 8), 2.0)):
            tensors = random_tensors(p, 2, size, channels, spread=spread, steps_per_pixel=64)
            tensors = tensors.to(dtype)
            expected = run_exactly(tensors, p)
            value, offset_mask, grad_output = (tensor.clone() for tensor in tensors)
            with machine_code() as launches:
                output = OPERATORS.dcnv4(value, offset_mask, *p)
                gradients = OPERATORS.dcnv4_backward(
                    grad_output, value, offset_mask, *p, deterministic=False
                )
            options = ", ".join(
                f"{k} {v}" for k, v in p._asdict().items() if v != getattr(plain, k)
            )
            for what, actual, exact in zip(
                ("output", "grad_value", "grad_offset_mask"),
                (output, *gradients),
                expected,
                strict=True,
            ):
                check(f"{what} of {name} D{channels}, {options}", actual, exact, tolerance(dtype))
            lengths = [
                [block.instructions.total() for block in launch.blocks.values()]
                for launch in launches
            ]
            forward, backward = (f"{min(counts)} to {max(counts)}" for counts in lengths)
            say(f"{name} D{channels}, {options}: {forward} and {backward} per block")


def check_attention_options() -> None:
    """Run the specialized kernels on points inside and outside of the levels, in both forms."""
    for name, channels, form in itertools.product(("fp16", "fp32"), (16, 64), FORMS):
        dtype = DTYPES[name]
        inputs = random_inputs(LEVELS, 4, 3, channels, queries=5, batch=1, steps=64).to(dtype)
        expected = attention_cases.run_exactly(inputs, form)
        inputs = attention_cases.Inputs(*(tensor.clone() for tensor in inputs))
        with machine_code():
            results = attention_cases.run_reference(inputs, form, OPERATORS, deterministic=False)
        for field, actual, exact in zip(results._fields, results, expected, strict=True):
            what = f"{field} of attention, {name} D{channels}, {form}"
            check(what, actual, exact, tolerance(dtype))


def check_fixed_order() -> None:
    """Run the kernels of the deterministic backward pass."""
    p = Parameters(groups=3)
    tensors = random_tensors(p, 1, (5, 6), 16, steps_per_pixel=64).to(torch.float16)
    expected = run_exactly(tensors, p)
    value, offset_mask, grad_output = (tensor.clone() for tensor in tensors)
    with machine_code():
        gradients = OPERATORS.dcnv4_backward(
            grad_output, value, offset_mask, *p, deterministic=True
        )
    for what, actual, exact in zip(
        ("grad_value", "grad_offset_mask"), gradients, expected[1:], strict=True
    ):
        check(f"{what} in a fixed order", actual, exact, tolerance(torch.float16))


def main(words: list[str]) -> None:
    if not compiler.AVAILABLE:
        sys.exit("nvcc and cuobjdump are needed; they come with CUDA")
    torch.set_num_threads(1)
    load()
    say(f"nvcc {compiler.compiler_version()}, sm_90, instructions per warp\n")
    say(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    for name, run in cases():
        if all(word in name.split() for word in words):
            counts = run()
            numbers = (counts.interior, counts.rim, counts.mean, counts.sectors)
            say(f"| {name} | {' | '.join(f'{number:.0f}' for number in numbers)} |")
    if words in ([], ["widths"]):
        say_widths()
    if not words:
        say("")
        check_options()
        check_attention_options()
        check_fixed_order()


if __name__ == "__main__":
    main(sys.argv[1:])
