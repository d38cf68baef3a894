"""Compare DCNv4 with DCNv3, and models with DCNv4 with those that they were made from.

    python -m benchmarks.paper
    python -m benchmarks.paper --shapes 1x14x14x256 --models internimage_tiny convnext_atto
    python -m benchmarks.paper --models  # the operators only

These are the comparisons of the paper (arXiv:2401.06197). An InternImage is compared with the
FlashInternImage of its size, and a ConvNeXt or vision transformer of timm with the same model after
`flash_internimage.dropin.replace`. Whatever is compared takes turns in one process; peak memory is
measured in a separate process for each model.
"""

import argparse
import difflib
import itertools
import operator
from typing import NamedTuple

import timm

from benchmarks import charts, dcnv3, dcnv4, model, op, record, timing
from benchmarks.model import Case
from benchmarks.record import write

SHAPES = {
    device: [shape for shape in shapes if dcnv4.Shape.parse(shape)]
    for device, shapes in op.SHAPES.items()
}
INTERNIMAGES = tuple(f"internimage_{size}" for size in ("tiny", "small", "base", "large"))
MODELS = {
    "cpu": (*INTERNIMAGES, "convnext_tiny", "vit_small_patch16_224"),
    "cuda": (*INTERNIMAGES, "convnext_base", "vit_base_patch16_224"),
}
REGISTERED = {"convnext_base": "convnext_base_dcnv4", "vit_base_patch16_224": "vit_base_dcnv4"}
BATCH_SIZES = {"cpu": 1, "cuda": 64}
OURS = ("DCNv4", "DCNv3")  # competitors on the kernels of this project
LEGEND = f"""
Operators: median time per call (~ marks an interquartile range above {timing.UNSTEADY:.0%}), time
relative to DCNv4 (x), and share of the memory-bandwidth bound (%). DCNv3 is the kernel of DCNv4
after a softmax, with offsets and modulation from separate tensors. In parentheses: why there is no
measurement.
Models: after each pair, how many times as long, and as much memory, the second model takes."""


class Pair(NamedTuple):
    """A model with DCNv4 and the one that it is compared with."""

    task: str
    dtype: str
    mode: str
    ours: str
    other: str

    @property
    def cases(self) -> tuple[Case, Case]:
        """Return the two cases: first with DCNv4, then without."""
        kind = self.task, self.dtype, self.mode
        return Case(*kind, self.ours), Case(*kind, self.other)


def counterpart(name: str) -> str | None:
    """Return the name of the model with DCNv4 that a timm model is compared with, if any."""
    if timm.is_model(f"flash_{name}"):
        return f"flash_{name}"
    return REGISTERED.get(name, name + model.DROPIN) if model.can_replace(name) else None


def time_pair(pair: Pair, args: argparse.Namespace) -> dict:
    """Time both models of a pair in turns; meant for a separate process.

    Returns:
        Summaries of the measurements by model, or the reason why there are none.
    """
    device = model.prepare_process(args)
    steps = {
        case.model: model.make_step(
            case, *model.build(case, device, args.batch_size, args.memory_format)
        )
        for case in pair.cases
    }
    prepares = {name: operator.itemgetter(name) for name in steps}
    return timing.measure_interleaved(prepares, [steps], args.min_time)


def compare(pair: Pair, args: argparse.Namespace) -> dict:
    """Measure both models of a pair, and write a row of the table for each.

    Returns:
        The results of both, and how many times as long and as much memory the other model takes.
    """
    write(f"\n{pair.task}, {pair.dtype}, {pair.mode}, batch size {args.batch_size}")
    once = argparse.Namespace(**vars(args) | {"min_time": 1e-6})  # for the peak memory
    results = {case.model: model.measure_isolated(case, once) for case in pair.cases}
    if all(result["status"] == "ok" for result in results.values()):
        times = model.measure_isolated(pair, args, time_pair)
        for name, result in results.items():
            result |= times.get(name, times)
            if result["status"] == "ok":
                result["images_per_second"] = args.batch_size / result["seconds"]
    for name, result in results.items():
        write(f"{name:34}{model.cell(result)}")
    ratios = {}
    ours, other = results.values()
    if ours["status"] == other["status"] == "ok":
        ratios["ratio"] = other["seconds"] / ours["seconds"]
        text = f"{ratios['ratio']:.2f}x time"
        if ours["peak_bytes"] and other["peak_bytes"]:
            ratios["memory_ratio"] = other["peak_bytes"] / ours["peak_bytes"]
            text += f", {ratios['memory_ratio']:.2f}x memory"
        write(f"{'':34}{text}")
    return {**pair._asdict(), **ratios, "models": results}


def parse_shape(text: str) -> dcnv3.Shape:
    """Parse a shape of the operators."""
    if shape := dcnv3.Shape.parse(text):
        return shape
    raise argparse.ArgumentTypeError(f"must be {dcnv3.Shape.form}, got {text!r}")


def parse_model(text: str) -> tuple[str, str]:
    """Return the names of the model with DCNv4 to compare with, and of the model itself."""
    if timm.is_model(text) and (ours := counterpart(text)):
        return ours, text
    known = sorted({*INTERNIMAGES, *filter(model.can_replace, timm.list_models())})
    close = difflib.get_close_matches(text, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise argparse.ArgumentTypeError(
        f"must be {', '.join(INTERNIMAGES)}, or a ConvNeXt or vision transformer of timm, "
        f"got {text!r}{hint}"
    )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line and fill in the defaults of the device."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper", description=__doc__.splitlines()[0]
    )
    option = parser.add_argument
    shapes = f"{dcnv3.Shape.form}; none to leave out the operators"
    option("--shapes", nargs="*", type=parse_shape, metavar="SHAPE", help=shapes)
    models = (
        "names of InternImages, and of timm's ConvNeXts and vision transformers; none to leave "
        "out the models; default: InternImage T, S, B and L, ConvNeXt-T and ViT-S; on a GPU "
        "ConvNeXt-B and ViT-B"
    )
    option("--models", nargs="*", type=parse_model, metavar="MODEL", help=models)
    model.add_options(parser, BATCH_SIZES)
    args = model.fill_in(parser.parse_args(argv), parser, BATCH_SIZES)
    if args.shapes is None:
        args.shapes = [parse_shape(text) for text in SHAPES[args.device]]
    if args.models is None:
        args.models = [parse_model(text) for text in MODELS[args.device]]
    if not args.shapes and not args.models:
        parser.error("argument --models: must name a model if --shapes names none")
    args.skip = []
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    args = parse_arguments(argv)
    device = model.prepare_process(args)
    names = ("tasks", "dtypes", "modes", "batch_size", "memory_format", "min_time")
    settings = {name: getattr(args, name) for name in names}
    settings["shapes"] = list(map(str, args.shapes))
    settings["models"] = [other for _, other in args.models]
    if args.shapes:
        settings["copy_bandwidth"] = timing.copy_bandwidth(device, args.min_time)
    run = record.start("paper", device, settings)
    write(LEGEND)
    problems = []
    for dtype, shape in itertools.product(args.dtypes, args.shapes):
        results = op.benchmark(shape, dtype, settings["copy_bandwidth"], args)
        run["results"] += results
        file = record.save(run, args.output)
        wrong = {r["competitor"] for r in results if r["status"] != "ok"} & set(OURS)
        problems += [f"{name} at {shape}, {dtype}: failed or wrong" for name in sorted(wrong)]
    if args.models:
        memory = model.MEMORY[args.device]
        write(model.LEGEND.format(memory=memory, memory_format=args.memory_format))
    for task, dtype, mode, (ours, other) in itertools.product(
        args.tasks, args.dtypes, args.modes, args.models
    ):
        run["results"].append(compare(Pair(task, dtype, mode, ours, other), args))
        file = record.save(run, args.output)
    if problems:
        raise SystemExit(f"error: {'; '.join(problems)}")
    write(f"\nresults: {file}\nchart: {charts.draw(file)}")


if __name__ == "__main__":
    main()
