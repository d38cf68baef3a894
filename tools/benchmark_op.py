"""Times DCNv4 against what else computes it, and beside other operators of like size.

    python -m tools.benchmark_op
    python -m tools.benchmark_op --shapes 1x56x56x64 64x56x56x128/32 --dtypes float32 float16

A shape is NxHxWxC/D with D channels per group, 16 if left out. Every competitor that computes DCNv4
is checked before it is timed, output and gradients.
"""

import argparse
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from torch import Tensor

from ops_dcnv4 import reference
from tools import benchmarking
from tools.benchmarking import write
from tools.op_competitors import (
    COMPETITORS,
    HEAD_CHANNELS,
    OURS,
    TAPS,
    Inputs,
    Shape,
    parse_shape,
    random_inputs,
)

# fmt: off
SHAPES = {
    "cpu": ("1x56x56x64", "1x56x56x128", "1x28x28x128", "1x14x14x256", "1x7x7x512"),
    "cuda": (
        "64x56x56x64", "64x28x28x128", "64x14x14x256", "64x7x7x512",
        "64x56x56x128", "64x56x56x128/32", "64x28x28x256/32", "1x200x320x128", "1x200x320x128/32",
        "1x56x56x64", "1x28x28x128", "1x14x14x256", "1x7x7x512",
    ),
}
# fmt: on
DTYPES = {"cpu": ("float32",), "cuda": ("float32", "float16", "bfloat16")}
# Of outputs and gradients, relative to the largest expected magnitude.
TOLERANCES = {"float32": 1e-4, "float64": 1e-10, "float16": 1e-2, "bfloat16": 5e-2}
MIN_INPUT_SETS = 4
LEGEND = f"""
Median times, ~ if the quartiles are more than 20 % apart; x: how many times as long as {OURS};
%: share of the memory floor, which is the time of a plain copy of as many bytes as DCNv4 must
touch. wrong: output or gradients differ from the reference. In brackets: why there is no time.
Yardsticks, which compute something else: the 7x7 depth-wise convolution, and attention in 7x7
windows or global, {HEAD_CHANNELS} channels a head."""


def forward(run: Callable[[Inputs], Tensor], inputs: Inputs) -> Callable[[], Tensor]:
    return torch.no_grad()(functools.partial(run, inputs))


def gradients(output: Tensor, inputs: Inputs) -> tuple[Tensor | None, ...]:
    """Of the four leaves, None for those that a competitor does not read."""
    return torch.autograd.grad(output, inputs[:4], inputs.grad_output, allow_unused=True)


def backward(run: Callable[[Inputs], Tensor], inputs: Inputs) -> Callable[[], tuple]:
    return functools.partial(gradients, run(inputs), inputs)


def forward_backward(run: Callable[[Inputs], Tensor], inputs: Inputs) -> Callable[[], tuple]:
    return lambda: gradients(run(inputs), inputs)


# Each makes the step that is timed; what happens before that is not.
PASSES = {"forward": forward, "backward": backward, "forward+backward": forward_backward}


def expected_results(inputs: Inputs) -> list[Tensor]:
    """The reference's output and gradients; one image at a time, which saves memory."""
    tensors = (inputs.grad_output, inputs.value.detach(), inputs.offset_mask.detach())
    images = []
    for grad_output, *image in zip(*(tensor.split(1) for tensor in tensors), strict=True):
        output = reference.dcnv4(*image, *inputs.parameters)
        images.append((output, *reference.dcnv4_backward(grad_output, *image, *inputs.parameters)))
    return [torch.cat(parts) for parts in zip(*images, strict=True)]


def is_right(run: Callable[[Inputs], Tensor], inputs: Inputs, expected: list[Tensor]) -> bool:
    """Whether output and gradients are as expected; the gradient of the padding may be anything."""
    used = 3 * TAPS * inputs.shape.groups
    tolerance = TOLERANCES[str(inputs.value.dtype).removeprefix("torch.")]
    output = forward(run, inputs)()
    grad_value, grad_offset_mask, *_ = forward_backward(run, inputs)()
    pairs = [
        (output, expected[0]),
        (grad_value, expected[1]),
        (grad_offset_mask[..., :used], expected[2][..., :used]),
    ]
    return all(
        torch.allclose(actual, wanted, rtol=0, atol=tolerance * wanted.abs().max().item())
        for actual, wanted in pairs
    )


def input_sets(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Inputs]:
    """So many that the caches do not hold them all."""
    cached = 2 * benchmarking.cache_bytes(device) / shape.bytes_touched(dtype)["forward"]
    count = max(MIN_INPUT_SETS, math.ceil(cached))
    return [random_inputs(shape, dtype, device) for _ in range(count)]


def examine(name: str, inputs: Inputs, expected: list[Tensor]) -> tuple[str, str | None]:
    """Status of a competitor and, if it cannot be timed, the reason."""
    run, why_not, yardstick = COMPETITORS[name]
    if why_not(inputs):
        return "skipped", why_not(inputs)
    try:
        return "ok" if yardstick or is_right(run, inputs, expected) else "wrong", None
    except Exception as error:  # whatever a foreign package raises
        return "failed", benchmarking.reason(error)


def time_competitor(
    name: str, inputs: list[Inputs], expected: list[Tensor], min_time: float
) -> Iterator[dict]:
    """A result for each pass."""
    status, note = examine(name, inputs[0], expected)
    if name == OURS and status != "ok":
        raise SystemExit(f"error: {OURS} is {note or status} at {inputs[0].shape}")
    for pass_name, make_step in PASSES.items():
        result = {"competitor": name, "pass": pass_name, "status": status, "note": note}
        if status in ("ok", "wrong"):
            prepare = functools.partial(make_step, COMPETITORS[name].run)
            device = inputs[0].value.device
            try:
                result |= benchmarking.measure(prepare, inputs, device, min_time)._asdict()
            except RuntimeError as error:
                result |= {"status": "failed", "note": benchmarking.reason(error)}
        yield result


def l1_floor(shape: Shape, dtype: torch.dtype, device: torch.device) -> float | None:
    """Seconds of the forward's gathers if every SM reads 128 bytes per clock."""
    if device.type != "cuda":
        return None
    gpu = torch.cuda.get_device_properties(device)
    return shape.bytes_gathered(dtype) / (gpu.multi_processor_count * 128 * 1e3 * gpu.clock_rate)


def compare(results: list[dict], floors: dict[str, float]) -> None:
    """Adds each result's ratio to ours and share of the floor."""
    timed = [r for r in results if "seconds" in r]
    ours = {r["pass"]: r["seconds"] for r in timed if r["competitor"] == OURS}
    for result in timed:
        if result["pass"] in ours:
            result["ratio"] = result["seconds"] / ours[result["pass"]]
        if not COMPETITORS[result["competitor"]].yardstick:
            result["floor_seconds"] = floors[result["pass"]]
            result["share_of_floor"] = result["floor_seconds"] / result["seconds"]


def cell(result: dict) -> str:
    if "seconds" not in result:
        return f"({result['note']})"
    share = f"{result['share_of_floor']:.0%}" if "share_of_floor" in result else ""
    share = "wrong" if result["status"] == "wrong" else share
    ratio = f"{result['ratio']:.2f}x" if "ratio" in result else ""
    mark = "~" * benchmarking.is_unsteady(result)
    return f"{mark}{1e6 * result['seconds']:.1f} us {ratio:>8} {share:>5}"


def write_row(name: str, cells: Iterable[str]) -> None:
    write(f"{name:17}" + "".join(f"{text:>29}" for text in cells))


def benchmark(
    shape: Shape, dtype_name: str, bandwidth: float, args: argparse.Namespace
) -> list[dict]:
    """Times the competitors at one shape, one line of the table each."""
    dtype = getattr(torch, dtype_name)
    inputs = input_sets(shape, dtype, args.device)
    expected = expected_results(inputs[0])
    floors = {name: n / bandwidth for name, n in shape.bytes_touched(dtype).items()}
    l1 = l1_floor(shape, dtype, args.device)
    write("")
    write_row(str(shape), PASSES)
    write_row(dtype_name, (f"memory floor {1e6 * floors[name]:.1f} us" for name in PASSES))
    if l1:
        write(f"floor of the forward in L1: {1e6 * l1:.1f} us")
    results = []
    for name in (name for name in COMPETITORS if name not in args.skip):
        passes = list(time_competitor(name, inputs, expected, args.min_time))
        results += passes
        compare(results, floors)
        write_row(name, map(cell, passes))
    place = {"shape": str(shape), "dtype": dtype_name, "l1_floor_seconds": l1}
    return [place | result for result in results]


def draw(record: dict, file: Path) -> None:
    """A dot for each competitor: how many times as long as ours it takes."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shapes, dtypes = record["settings"]["shapes"], record["settings"]["dtypes"]
    size = 13, 1.6 + len(dtypes) * (0.8 + 0.32 * len(shapes))
    figure, axes = plt.subplots(
        len(dtypes), len(PASSES), figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    for row, dtype in zip(axes, dtypes, strict=True):
        for axis, pass_name in zip(row, PASSES, strict=True):
            panel = [r for r in record["results"] if (r["dtype"], r["pass"]) == (dtype, pass_name)]
            draw_panel(axis, panel, shapes)
            axis.set_title(f"{pass_name}, {dtype}")
    figure.suptitle(
        f"Time relative to {OURS} on {benchmarking.machine_name(record['machine'])}, "
        f"{record['date'][:10]} (right of the line: slower; hollow: yardsticks; cross: wrong)"
    )
    drawn = {line.get_label(): line for axis in axes.flat for line in axis.lines[::-1]}
    handles = [drawn[name] for name in ("memory floor", *COMPETITORS) if name in drawn]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def draw_panel(axis: Axes, results: list[dict], shapes: list[str]) -> None:
    names = list(COMPETITORS)
    for result in (r for r in results if "ratio" in r):
        name, row = result["competitor"], shapes.index(result["shape"])
        if name == OURS:
            axis.plot(result["share_of_floor"], row, "|k", markersize=12, label="memory floor")
            continue
        fill = "none" if COMPETITORS[name].yardstick else "full"
        marker = "X" if result["status"] == "wrong" else "o"
        color = f"C{names.index(name)}"
        axis.plot(result["ratio"], row, marker, color=color, fillstyle=fill, label=name)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}x")
    axis.set_yticks(range(len(shapes)), shapes)
    axis.set_ylim(len(shapes) - 0.5, -0.5)
    axis.grid(alpha=0.3)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.benchmark_op", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=parse_shape,
        metavar="NxHxWxC/D",
        help="D channels per group, 16 if left out; default: five on the CPU, thirteen on a GPU",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=TOLERANCES,
        help="default: float32, on a GPU float16 and bfloat16 too",
    )
    others = [name for name in COMPETITORS if name != OURS]
    parser.add_argument(
        "--skip", nargs="+", default=[], choices=others, metavar="NAME", help=", ".join(others)
    )
    benchmarking.add_common_options(parser, min_time=0.3)
    args = parser.parse_args(argv)
    args.shapes = args.shapes or [parse_shape(text) for text in SHAPES[args.device.type]]
    args.dtypes = args.dtypes or DTYPES[args.device.type]
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    bandwidth = benchmarking.copy_bandwidth(args.device)
    settings = {
        "shapes": list(map(str, args.shapes)),
        "dtypes": list(args.dtypes),
        "min_time": args.min_time,
        "compiled": benchmarking.has_kernel(args.device),
        "copy_bandwidth": bandwidth,
    }
    record = benchmarking.describe_run("op", args.device, settings)
    benchmarking.write_heading(record)
    write(f"copy: {bandwidth / 1e9:.1f} GB/s; compiled: {settings['compiled']}\n{LEGEND}")
    for dtype in args.dtypes:
        for shape in args.shapes:
            record["results"] += benchmark(shape, dtype, bandwidth, args)
            benchmarking.save(record, args.output)
    benchmarking.finish(record, draw, args.output)


if __name__ == "__main__":
    main()
