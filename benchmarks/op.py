"""Benchmark DCNv4 and deformable attention against alternative implementations.

    python -m benchmarks.op
    python -m benchmarks.op --shapes 1x56x56x64 64x56x56x128/32 --dtypes float32 float16
    python -m benchmarks.op --shapes dino-encoder 2xdino-decoder

DCNv4 shapes are NxHxWxC/D with D channels per group (16 by default); other operators of similar
size are included as baselines. Shapes of multi-scale deformable attention are those of DINO's
encoder and decoder, preceded by the batch size (1 by default). Before timing, output and gradients
of all implementations except the baselines are verified.
"""

import argparse
import functools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from benchmarks import attention, charts, dcnv4, predict, record, timing
from benchmarks.competitors import (
    TOLERANCES,
    Competitor,
    Unavailable,
    bytes_touched,
    expected_results,
)
from benchmarks.record import write

Shape = dcnv4.Shape | attention.Shape
Inputs = dcnv4.Inputs | attention.Inputs

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
MIN_INPUT_SETS = 4
LEGEND = f"""
Median time per call (~ marks an interquartile range above {timing.UNSTEADY:.0%}), time relative to
ours, the first row (x), and share of the memory-bandwidth bound (%): the time to copy the same
bytes that the operator must read and write. "wrong": output or gradients differ from the reference.
In parentheses: why there is no measurement. The baselines for DCNv4 compute something else: a 7x7
depth-wise convolution, and attention within 7x7 windows or over all pixels, with
{dcnv4.HEAD_CHANNELS} channels per head."""


def parse_shape(text: str) -> Shape:
    """Parse a shape of either operator."""
    if shape := dcnv4.Shape.parse(text) or attention.Shape.parse(text):
        return shape
    forms = f"{dcnv4.Shape.form}, or {attention.Shape.form}"
    raise argparse.ArgumentTypeError(f"must be {forms}, got {text!r}")


def forward(competitor: Competitor, inputs: Inputs) -> Callable[[], Tensor]:
    """Return a call of the forward pass without gradients."""
    return torch.no_grad()(functools.partial(competitor.run, inputs))


def backward(competitor: Competitor, inputs: Inputs) -> Callable[[], tuple]:
    """Run the forward pass and return a call of the backward pass, which can be repeated."""
    output = competitor.run(inputs)
    return functools.partial(competitor.gradients, inputs, output, retain_graph=True)


def forward_backward(competitor: Competitor, inputs: Inputs) -> Callable[[], tuple]:
    """Return a call of both passes."""
    return lambda: competitor.gradients(inputs, competitor.run(inputs))


# Functions that prepare the call to time. Only the call itself is timed.
PASSES = dict(zip(charts.PASSES, (forward, backward, forward_backward), strict=True))


def is_right(competitor: Competitor, inputs: Inputs, expected: dict[str, Tensor]) -> bool:
    """Run a competitor and return whether output and gradients, without padding, are right."""
    tolerance = competitor.tolerances[str(inputs.value.dtype).removeprefix("torch.")]
    actual = forward(competitor, inputs)(), *forward_backward(competitor, inputs)()
    if competitor.baseline:
        return True
    for name, tensor in zip(("output", *competitor.leaves), actual, strict=True):
        right = expected[name]
        limit = tolerance * right.abs().max().item()
        if not torch.allclose(tensor[..., : right.shape[-1]], right, rtol=0, atol=limit):
            return False
    return True


def examine(competitor: Competitor, inputs: Inputs, expected: dict[str, Tensor]) -> dict:
    """Return the status of a competitor and, if it cannot be timed, the reason."""
    try:
        right = is_right(competitor, inputs, expected)
    except Unavailable as error:
        return {"status": "skipped", "note": str(error)}
    except Exception as error:  # third-party packages may raise anything
        return {"status": "failed", "note": timing.reason(error)}
    return {"status": "ok" if right else "wrong", "note": None}


def input_sets(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Inputs]:
    """Return enough inputs that each call reads from memory, not cache."""
    first = shape.random_inputs(dtype, device)
    cached = math.ceil(2 * timing.cache_bytes(device) / bytes_touched(first)["forward"])
    count = max(MIN_INPUT_SETS, cached)
    return [first, *(shape.random_inputs(dtype, device) for _ in range(count - 1))]


def time_competitors(
    competitors: dict[str, Competitor],
    inputs: Sequence[Inputs],
    floors: dict[str, float],
    min_time: float,
) -> list[dict]:
    """Verify and time competitors; return a result for each pass and competitor.

    If ours fails or its results are wrong, nothing is timed.

    Args:
        competitors: Implementations by name; the first is ours.
        inputs: Sets of inputs to cycle through.
        floors: Memory-bandwidth bound of each pass: seconds to copy the same bytes.
        min_time: Measuring time of each case in seconds.
    """
    ours, expected = next(iter(competitors)), expected_results(inputs[0])
    statuses = {name: examine(c, inputs[0], expected) for name, c in competitors.items()}
    if statuses[ours]["status"] != "ok":  # comparing with wrong results would be pointless
        return [{"competitor": ours, "pass": name, **statuses[ours]} for name in PASSES]
    able = [name for name, status in statuses.items() if status["note"] is None]
    results = []
    for pass_name, prepare in PASSES.items():
        prepares = {name: functools.partial(prepare, competitors[name]) for name in able}
        timings = timing.measure_interleaved(prepares, inputs, min_time)
        for name, status in statuses.items():
            result = {"competitor": name, "pass": pass_name, **status, **timings.get(name, {})}
            if "seconds" in result and "seconds" in timings[ours]:
                result["ratio"] = result["seconds"] / timings[ours]["seconds"]
            if "seconds" in result and not competitors[name].baseline:
                result["floor_seconds"] = floors[pass_name]
                result["share_of_floor"] = floors[pass_name] / result["seconds"]
            results.append(result)
    return results


def l1_floor(inputs: Inputs) -> float | None:
    """Return the L1-bandwidth bound of the forward pass in seconds: 128 bytes per SM and clock."""
    if inputs.value.device.type != "cuda":
        return None
    gpu = torch.cuda.get_device_properties(inputs.value.device)
    gathered = inputs.grad_output.nbytes * 4 * inputs.shape.samples  # four pixels per sample
    return gathered / (gpu.multi_processor_count * 128 * 1e3 * gpu.clock_rate)


def cell(result: dict) -> str:
    """Format a result for the table."""
    if "seconds" not in result:
        return f"({result['note'] or 'wrong results'})"
    share = f"{result['share_of_floor']:.0%}" if "share_of_floor" in result else ""
    share = "wrong" if result["status"] == "wrong" else share
    ratio = f"{result['ratio']:.2f}x" if "ratio" in result else ""
    mark = "~" * timing.is_unsteady(result)
    return f"{mark}{1e6 * result['seconds']:.1f} us {ratio:>8} {share:>5}"


def write_row(name: str, cells: Iterable[str]) -> None:
    """Write a row of the table."""
    write(f"{name:17}" + "".join(f"{text:>29}" for text in cells))


def benchmark(
    shape: Shape, dtype_name: str, bandwidth: float, args: argparse.Namespace
) -> list[dict]:
    """Time the competitors at one shape, and write a table with a row for each."""
    inputs = input_sets(shape, getattr(torch, dtype_name), torch.device(args.device))
    touched, l1 = bytes_touched(inputs[0]), l1_floor(inputs[0])
    floors = {name: size / bandwidth for name, size in touched.items()}
    output_bytes = inputs[0].grad_output.nbytes
    predicted = predict.operator_seconds(
        shape.family, dtype_name, shape.group_channels, output_bytes, touched
    )
    write("")
    write_row(str(shape), PASSES)
    write_row(dtype_name, (f"bandwidth bound {1e6 * floors[name]:.1f} us" for name in PASSES))
    if predicted:
        write_row("H200, predicted", (f"{1e6 * predicted[name]:.1f} us" for name in PASSES))
    if l1:
        write(f"L1-bandwidth bound of the forward pass: {1e6 * l1:.1f} us")
    competitors = {n: c for n, c in shape.competitors.items() if n not in args.skip}
    results = time_competitors(competitors, inputs, floors, args.min_time)
    for name in dict.fromkeys(result["competitor"] for result in results):
        write_row(name, (cell(result) for result in results if result["competitor"] == name))
    for result in results[:: len(results) // len(PASSES)]:  # ours
        result["predicted_seconds"] = predicted.get(result["pass"])
    place = {"shape": str(shape), "dtype": dtype_name, "l1_floor_seconds": l1}
    return [place | result for result in results]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line and fill in the defaults of the device."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.op", description=__doc__.splitlines()[0]
    )
    option = functools.partial(parser.add_argument, nargs="+")
    forms = f"{dcnv4.Shape.form}; or {attention.Shape.form}"
    option("--shapes", type=parse_shape, metavar="SHAPE", help=forms)
    option("--dtypes", choices=TOLERANCES, help="default: float32; on a GPU also the 16-bit types")
    names = dict.fromkeys([*dcnv4.Shape.competitors, *attention.Shape.competitors])
    others = [name for name in names if name not in ("ops_dcnv4", "ms_deform_attn")]
    skip = f"implementations to leave out: all or some of {', '.join(others)}"
    option("--skip", choices=["all", *others], default=[], metavar="NAME", help=skip)
    record.add_common_options(parser, min_time=0.3)
    args = parser.parse_args(argv)
    args.shapes = args.shapes or [parse_shape(text) for text in SHAPES[args.device]]
    args.dtypes = args.dtypes or DTYPES[args.device]
    args.skip = others if "all" in args.skip else args.skip
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    args = parse_arguments(argv)
    device = torch.device(args.device)
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    bandwidth = timing.copy_bandwidth(device, args.min_time)
    settings = {
        "shapes": list(map(str, args.shapes)),
        "dtypes": list(args.dtypes),
        "min_time": args.min_time,
        "copy_bandwidth": bandwidth,
    }
    run = record.start("op", device, settings)
    write(f"copy bandwidth: {bandwidth / 1e9:.1f} GB/s\n{LEGEND}")
    problems = []
    for dtype in args.dtypes:
        for shape in args.shapes:
            ours, *others = benchmark(shape, dtype, bandwidth, args)
            run["results"] += [ours, *others]
            file = record.save(run, args.output)
            if ours["status"] != "ok":
                what = ours["note"] or "wrong results"
                problems.append(f"{ours['competitor']} at {shape}, {dtype}: {what}")
    if problems:
        raise SystemExit(f"error: {'; '.join(problems)}")
    write(f"\nresults: {file}\nchart: {charts.draw(file)}")


if __name__ == "__main__":
    main()
