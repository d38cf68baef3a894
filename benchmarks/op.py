"""Benchmark DCNv4 and deformable attention against alternative implementations.

    python -m benchmarks.op
    python -m benchmarks.op --shapes 1x56x56x64 64x56x56x128/32 --dtypes float32 float16
    python -m benchmarks.op --shapes dino-encoder 2xdino-decoder

DCNv4 shapes are NxHxWxC/D with D channels per group (16 by default); other operators of similar
size are included as yardsticks. Shapes of multi-scale deformable attention are those of DINO's
encoder and decoder, preceded by the batch size (1 by default). Before timing, output and gradients
of all implementations except the yardsticks are verified.
"""

import argparse
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from torch import Tensor

from benchmarks import attention as attention_competitors
from benchmarks import dcnv4 as op_competitors
from benchmarks import record as benchmarking
from benchmarks.competitors import TOLERANCES, Competitor, Inputs, Shape
from benchmarks.record import write

KINDS: tuple[type[Shape], ...] = (op_competitors.Shape, attention_competitors.Shape)

# fmt: off
SHAPES = {
    "cpu": (
        "1x56x56x64", "1x56x56x128", "1x28x28x128", "1x14x14x256", "1x7x7x512",
        "dino-encoder", "dino-decoder",
    ),
    "cuda": (
        "64x56x56x64", "64x28x28x128", "64x14x14x256", "64x7x7x512",
        "64x56x56x128", "64x56x56x128/32", "64x28x28x256/32", "1x200x320x128", "1x200x320x128/32",
        "1x56x56x64", "1x28x28x128", "1x14x14x256", "1x7x7x512",
        "dino-encoder", "2xdino-encoder", "dino-decoder",
    ),
}
# fmt: on
DTYPES = {"cpu": ("float32",), "cuda": ("float32", "float16", "bfloat16")}
MIN_INPUT_SETS, TURNS = 4, 5
LEGEND = f"""
Median times, ~ if the quartiles are more than 20 % apart; x: how many times as long as ours, the
first; %: share of the memory floor, which is the time of a plain copy of as many bytes as the
operator must touch. wrong: output or gradients differ from the reference. In brackets: why there
is no time. Yardsticks of DCNv4, which compute something else: the 7x7 depth-wise convolution, and
attention in 7x7 windows or global, {op_competitors.HEAD_CHANNELS} channels a head."""


def parse_shape(text: str) -> Shape:
    """Parse a shape of either operator."""
    for kind in KINDS:
        if shape := kind.parse(text):
            return shape
    forms = ", or ".join(kind.form for kind in KINDS)
    raise argparse.ArgumentTypeError(f"{text!r} must be {forms}")


def forward(competitor: Competitor, inputs: Inputs) -> Callable[[], Tensor]:
    """Return a step that runs the forward pass without gradients."""
    return torch.no_grad()(functools.partial(competitor.run, inputs))


def gradients(output: Tensor, competitor: Competitor, inputs: Inputs) -> tuple[Tensor, ...]:
    """Return the gradients of the leaves."""
    leaves = [getattr(inputs, name) for name in competitor.leaves]
    return torch.autograd.grad(output, leaves, inputs.grad_output)


def backward(competitor: Competitor, inputs: Inputs) -> Callable[[], tuple]:
    """Run the forward pass and return a step that runs the backward pass."""
    return functools.partial(gradients, competitor.run(inputs), competitor, inputs)


def forward_backward(competitor: Competitor, inputs: Inputs) -> Callable[[], tuple]:
    """Return a step that runs both passes."""
    return lambda: gradients(competitor.run(inputs), competitor, inputs)


# Functions that prepare the step to time. Only the step itself is timed.
PASSES = {"forward": forward, "backward": backward, "forward+backward": forward_backward}


def is_right(competitor: Competitor, inputs: Inputs, expected: dict[str, Tensor]) -> bool:
    """Return whether output and gradients are as expected; gradients of padding are ignored."""
    tolerance = competitor.tolerances[str(inputs.value.dtype).removeprefix("torch.")]
    output = forward(competitor, inputs)()
    grads = forward_backward(competitor, inputs)()
    for name, actual in zip(("output", *competitor.leaves), (output, *grads), strict=True):
        wanted = expected[name]
        largest = wanted.abs().max().item()
        actual = actual[..., : wanted.shape[-1]]
        if not torch.allclose(actual, wanted, rtol=0, atol=tolerance * largest):
            return False
    return True


def input_sets(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Inputs]:
    """Return so many sets of inputs that they do not all fit in the caches."""
    cached = 2 * benchmarking.cache_bytes(device) / shape.bytes_touched(dtype)["forward"]
    count = max(MIN_INPUT_SETS, math.ceil(cached))
    return [shape.random_inputs(dtype, device) for _ in range(count)]


def examine(name: str, inputs: Inputs, expected: dict[str, Tensor]) -> tuple[str, str | None]:
    """Return the status of a competitor and, if it cannot be timed, the reason."""
    competitor = inputs.shape.competitors[name]
    if why_not := competitor.why_not(inputs):
        return "skipped", why_not
    try:
        right = competitor.yardstick or is_right(competitor, inputs, expected)
        return "ok" if right else "wrong", None
    except Exception as error:  # third-party packages may raise anything
        return "failed", benchmarking.reason(error)


def time_pass(
    make_step: Callable, names: Sequence[str], inputs: list[Inputs], min_time: float
) -> dict[str, dict]:
    """Time one pass of each competitor.

    The competitors take turns, so that changes in the machine's speed affect all of them.
    """
    competitors, device = inputs[0].shape.competitors, inputs[0].value.device
    measurements, failures = {}, {}
    for turn in range(TURNS + 1):
        for name in (name for name in names if name not in failures):
            try:
                if turn == 0:
                    prepare = functools.partial(make_step, competitors[name])
                    measurements[name] = benchmarking.Measurement(prepare, inputs, device, min_time)
                measurements[name].advance(turn / TURNS)
            except RuntimeError as error:
                failures[name] = {"status": "failed", "note": benchmarking.reason(error)}
    timed = {name: measurements[name].timing._asdict() for name in names if name not in failures}
    return timed | failures


def time_competitors(
    names: Sequence[str], inputs: list[Inputs], expected: dict[str, Tensor], min_time: float
) -> list[dict]:
    """Return a result for each competitor and pass."""
    shape = inputs[0].shape
    statuses = {name: examine(name, inputs[0], expected) for name in names}
    status, note = statuses[shape.ours]
    if status != "ok":
        raise SystemExit(f"error: {shape.ours} is {note or status} at {shape}")
    able = [name for name, (status, _) in statuses.items() if status in ("ok", "wrong")]
    measured = {
        pass_name: time_pass(make_step, able, inputs, min_time)
        for pass_name, make_step in PASSES.items()
    }
    return [
        {"competitor": name, "pass": pass_name, "status": status, "note": note}
        | measured[pass_name].get(name, {})
        for name, (status, note) in statuses.items()
        for pass_name in PASSES
    ]


def l1_floor(shape: Shape, dtype: torch.dtype, device: torch.device) -> float | None:
    """Return the seconds that the forward's gathers take if each SM reads 128 bytes per clock."""
    if device.type != "cuda":
        return None
    gpu = torch.cuda.get_device_properties(device)
    return shape.bytes_gathered(dtype) / (gpu.multi_processor_count * 128 * 1e3 * gpu.clock_rate)


def compare(results: list[dict], shape: Shape, floors: dict[str, float]) -> None:
    """Add to each result its ratio to ours and its share of the memory floor."""
    timed = [r for r in results if "seconds" in r]
    ours = {r["pass"]: r["seconds"] for r in timed if r["competitor"] == shape.ours}
    for result in timed:
        if result["pass"] in ours:
            result["ratio"] = result["seconds"] / ours[result["pass"]]
        if not shape.competitors[result["competitor"]].yardstick:
            result["floor_seconds"] = floors[result["pass"]]
            result["share_of_floor"] = result["floor_seconds"] / result["seconds"]


def cell(result: dict) -> str:
    """Format a result for the table."""
    if "seconds" not in result:
        return f"({result['note']})"
    share = f"{result['share_of_floor']:.0%}" if "share_of_floor" in result else ""
    share = "wrong" if result["status"] == "wrong" else share
    ratio = f"{result['ratio']:.2f}x" if "ratio" in result else ""
    mark = "~" * benchmarking.is_unsteady(result)
    return f"{mark}{1e6 * result['seconds']:.1f} us {ratio:>8} {share:>5}"


def write_row(name: str, cells: Iterable[str]) -> None:
    """Write a row of the table."""
    write(f"{name:17}" + "".join(f"{text:>29}" for text in cells))


def benchmark(
    shape: Shape, dtype_name: str, bandwidth: float, args: argparse.Namespace
) -> list[dict]:
    """Time the competitors at one shape, and write a row of the table for each."""
    dtype = getattr(torch, dtype_name)
    inputs = input_sets(shape, dtype, args.device)
    expected = shape.expected_results(inputs[0])
    floors = {name: n / bandwidth for name, n in shape.bytes_touched(dtype).items()}
    l1 = l1_floor(shape, dtype, args.device)
    write("")
    write_row(str(shape), PASSES)
    write_row(dtype_name, (f"memory floor {1e6 * floors[name]:.1f} us" for name in PASSES))
    if l1:
        write(f"floor of the forward in L1: {1e6 * l1:.1f} us")
    names = [name for name in shape.competitors if name not in args.skip]
    results = time_competitors(names, inputs, expected, args.min_time)
    compare(results, shape, floors)
    for name in names:
        write_row(name, (cell(result) for result in results if result["competitor"] == name))
    place = {"shape": str(shape), "dtype": dtype_name, "l1_floor_seconds": l1}
    return [place | result for result in results]


def competitor_names(shapes: Sequence[Shape]) -> list[str]:
    """Return the names of the competitors at all shapes, without ours."""
    names = dict.fromkeys(name for shape in shapes for name in shape.competitors)
    return [name for name in names if name not in {shape.ours for shape in shapes}]


def draw(record: dict, file: Path) -> None:
    """Draw a dot for each competitor: how many times as long as ours it takes."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shapes = [parse_shape(text) for text in record["settings"]["shapes"]]
    dtypes = record["settings"]["dtypes"]
    size = 13, 1.6 + len(dtypes) * (0.8 + 0.32 * len(shapes))
    figure, axes = plt.subplots(
        len(dtypes), len(PASSES), figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    for row, dtype in zip(axes, dtypes, strict=True):
        for axis, pass_name in zip(row, PASSES, strict=True):
            panel = [r for r in record["results"] if (r["dtype"], r["pass"]) == (dtype, pass_name)]
            draw_panel(axis, panel, shapes)
            axis.set_title(f"{pass_name}, {dtype}")
    ours = " and ".join(dict.fromkeys(shape.ours for shape in shapes))
    figure.suptitle(
        f"Time relative to {ours} on {benchmarking.machine_name(record['machine'])}, "
        f"{record['date'][:10]}\n(right of the line: slower; hollow: yardsticks; cross: wrong)"
    )
    drawn = {line.get_label(): line for axis in axes.flat for line in axis.lines[::-1]}
    handles = [drawn[name] for name in ("memory floor", *competitor_names(shapes)) if name in drawn]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def draw_panel(axis: Axes, results: list[dict], shapes: list[Shape]) -> None:
    """Draw the panel of one dtype and pass."""
    tab20 = matplotlib.color_sequences["tab20"]
    colors = dict(zip(competitor_names(shapes), tab20[::2] + tab20[1::2], strict=False))
    rows = list(map(str, shapes))
    for result in (r for r in results if "ratio" in r):
        name, row = result["competitor"], rows.index(result["shape"])
        if name == shapes[row].ours:
            axis.plot(result["share_of_floor"], row, "|k", markersize=12, label="memory floor")
            continue
        fill = "none" if shapes[row].competitors[name].yardstick else "full"
        marker = "X" if result["status"] == "wrong" else "o"
        axis.plot(result["ratio"], row, marker, color=colors[name], fillstyle=fill, label=name)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:g}x")
    axis.set_yticks(range(len(shapes)), rows)
    axis.set_ylim(len(shapes) - 0.5, -0.5)
    axis.grid(alpha=0.3)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line and fill in the defaults of the device."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.op", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=parse_shape,
        metavar="SHAPE",
        help="; or ".join(kind.form for kind in KINDS)
        + f"; default: {len(SHAPES['cpu'])} on the CPU, {len(SHAPES['cuda'])} on a GPU",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=TOLERANCES,
        help="default: float32, on a GPU float16 and bfloat16 too",
    )
    others = competitor_names([parse_shape(text) for text in SHAPES["cpu"]])
    parser.add_argument(
        "--skip", nargs="+", default=[], choices=others, metavar="NAME", help=", ".join(others)
    )
    benchmarking.add_common_options(parser, min_time=0.3)
    args = parser.parse_args(argv)
    args.shapes = args.shapes or [parse_shape(text) for text in SHAPES[args.device.type]]
    args.dtypes = args.dtypes or DTYPES[args.device.type]
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
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
