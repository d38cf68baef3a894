"""Measure images per second and peak memory of FlashInternImage, ConvNeXt and Swin.

    python -m benchmarks.model
    python -m benchmarks.model --models small base --dtypes bfloat16 --modes eager compiled

Each measurement runs in a process of its own, so that a failure does not affect the others.
"""

import argparse
import contextlib
import difflib
import functools
import itertools
import logging
import multiprocessing
import re
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import matplotlib
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flash_internimage  # noqa: F401  (registers the models)
from benchmarks import record as benchmarking
from benchmarks.record import write

_logger = logging.getLogger(__name__)

TASKS = ("inference", "training")
SIZES = {
    size: (f"flash_internimage_{size}", f"convnext_{size}", f"swin_{size}_patch4_window7_224")
    for size in ("tiny", "small", "base")
}
DTYPES = {"cpu": ("float32",), "cuda": ("float32", "bfloat16")}
MODES = {"cpu": ("eager",), "cuda": ("eager", "compiled")}
BATCH_SIZES = {"cpu": 4, "cuda": 64}
LEGEND = """
Parameters, resolution (the model's own), images per second (median, ~ if the quartiles are more
than 20 % apart) and peak memory. Random images in channels-last memory.
inference: weights and images in the dtype. training: forward and backward, without an optimizer
step; float32 weights, autocast to other dtypes. In brackets: why there is no figure.
Peak memory: {memory}."""
MEMORY = {
    "cuda": "allocated on the GPU, weights included",
    "cpu": "growth of the process, weights included (unknown if compiled)",
}


class Case(NamedTuple):
    """A case to measure."""

    task: str
    dtype: str
    mode: str
    model: str


class Settings(NamedTuple):
    """Settings of all cases."""

    device: torch.device
    batch_size: int
    threads: int
    min_time: float


def build(case: Case, settings: Settings) -> tuple[nn.Module, Tensor]:
    """Return the model of a case, compiled if requested, and images for it."""
    model = timm.create_model(case.model)
    images = torch.randn(settings.batch_size, *model.default_cfg["input_size"])
    dtype = getattr(torch, case.dtype) if case.task == "inference" else torch.float32
    options = {"dtype": dtype, "memory_format": torch.channels_last}
    model = model.train(case.task == "training").to(settings.device, **options)
    images = images.to(settings.device, **options)
    return torch.compile(model) if case.mode == "compiled" else model, images


def infer(model: nn.Module, images: Tensor) -> None:
    """Run the model in inference mode."""
    with torch.inference_mode():
        model(images)


def train(model: nn.Module, images: Tensor, targets: Tensor, dtype: torch.dtype) -> None:
    """Run forward and backward, without the optimizer step, which is the same for all models."""
    model.zero_grad(set_to_none=True)
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        loss = F.cross_entropy(model(images), targets)
    loss.backward()


def make_step(case: Case, model: nn.Module, images: Tensor) -> Callable[[], None]:
    """Return the step to time."""
    if case.task == "inference":
        return functools.partial(infer, model, images)
    targets = torch.randint(10, (len(images),), device=images.device)
    return functools.partial(train, model, images, targets, getattr(torch, case.dtype))


def resident_bytes(field: str) -> int | None:
    """Return VmRSS (current) or VmHWM (peak) of this process, or None if it is unknown."""
    try:
        found = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def reset_peak(device: torch.device) -> None:
    """Reset the peak memory of the device, or of this process on the CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def measure(case: Case, settings: Settings) -> dict:
    """Measure speed and peak memory of one case; meant for a process of its own."""
    torch.manual_seed(0)
    torch.set_num_threads(settings.threads)
    torch.backends.cudnn.benchmark = True
    before = resident_bytes("VmRSS")
    model, images = build(case, settings)
    step = make_step(case, model, images)
    step()  # compiles, autotunes, and makes the lasting allocations
    reset_peak(settings.device)
    timing = benchmarking.measure(lambda step: step, [step], settings.device, settings.min_time)
    if settings.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(settings.device)
    else:
        peak = resident_bytes("VmHWM") - before if before and case.mode == "eager" else None
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "image_size": images.shape[-1],
        "images_per_second": settings.batch_size / timing.seconds,
        "peak_bytes": peak,
        **timing._asdict(),
    }


def send_result(connection: Connection, case: Case, settings: Settings) -> None:
    """Measure a case and send the result, or why there is none."""
    try:
        connection.send({"status": "ok", **measure(case, settings)})
    except Exception as error:  # compilers, drivers and models may raise anything
        _logger.warning("%s failed: %s", " ".join(case), error)
        connection.send({"status": "failed", "note": benchmarking.reason(error)})


def measure_isolated(case: Case, settings: Settings, timeout: float) -> dict:
    """Return the result of `measure` in a new process, or why there is none."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "flash_internimage", "matplotlib"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_result, args=(sender, case, settings))
    process.start()
    sender.close()
    try:
        if receiver.poll(timeout):
            return receiver.recv()
        return {"status": "failed", "note": f"over {timeout:g} s"}
    except EOFError:
        return {"status": "failed", "note": "killed"}  # by the system, usually out of memory
    finally:
        process.kill()
        process.join()


def cell(result: dict) -> str:
    """Format a result for the table."""
    if result["status"] != "ok":
        return f"({result['note']})"
    peak = "-" if result["peak_bytes"] is None else f"{result['peak_bytes'] / 2**30:.2f} GiB"
    speed = "~" * benchmarking.is_unsteady(result) + f"{result['images_per_second']:.1f} images/s"
    size = f"{result['parameters'] / 1e6:6.1f} M {result['image_size']:6}"
    return f"{size}{speed:>20}{peak:>14}"


def draw(record: dict, file: Path) -> None:
    """Draw bars of images per second, with a panel for each task, dtype and mode."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tasks, models = record["settings"]["tasks"], record["settings"]["models"]
    kinds = list(itertools.product(record["settings"]["dtypes"], record["settings"]["modes"]))
    size = 2.5 + 3.5 * len(kinds), 0.8 + len(tasks) * (0.7 + 0.35 * len(models))
    figure, axes = plt.subplots(
        len(tasks), len(kinds), figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    for (task, kind), axis in zip(itertools.product(tasks, kinds), axes.flat, strict=True):
        panel = {
            r["model"]: r.get("images_per_second", 0)
            for r in record["results"]
            if (r["task"], r["dtype"], r["mode"]) == (task, *kind)
        }
        colors = ["C1" if name.startswith("flash_internimage") else "C0" for name in models]
        bars = axis.barh(models, [panel[name] for name in models], color=colors)
        axis.bar_label(bars, fmt=lambda speed: f"{speed:.4g}" if speed else "-", padding=3)
        axis.margins(x=0.2)
        axis.set_title(f"{task}, {', '.join(kind)}", fontsize="medium")
    axes[0, 0].invert_yaxis()  # shared by all panels
    name = benchmarking.machine_name(record["machine"])
    figure.suptitle(
        f"Images per second, batch {record['settings']['batch_size']}\n"
        f"{name}, {record['date'][:10]}",
        fontsize="medium",
    )
    figure.savefig(file, dpi=120)
    plt.close(figure)


def parse_model(text: str) -> tuple[str, ...]:
    """Return the models that a size stands for, or the model of that name."""
    if text in SIZES:
        return SIZES[text]
    if timm.is_model(text):
        return (text,)
    close = difflib.get_close_matches(text, [*SIZES, *timm.list_models()], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise argparse.ArgumentTypeError(
        f"{text!r} must be tiny, small, base or the name of a timm model{hint}"
    )


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line and fill in the defaults of the device."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model", description=__doc__.splitlines()[0]
    )
    options = functools.partial(parser.add_argument, nargs="+")
    options(
        "--models",
        type=parse_model,
        default=[SIZES["tiny"]],
        metavar="MODEL",
        help="timm models; tiny (default), small and base stand for three each",
    )
    options("--tasks", choices=TASKS, default=TASKS)
    options("--dtypes", choices=("float32", "bfloat16", "float16"))
    options("--modes", choices=("eager", "compiled"))
    parser.add_argument("--batch-size", type=benchmarking.positive(int), help="4, on a GPU 64")
    parser.add_argument(
        "--timeout",
        type=benchmarking.positive(float),
        default=600,
        metavar="SECONDS",
        help="after which a measurement is given up, default %(default)s",
    )
    benchmarking.add_common_options(parser, min_time=3)
    args = parser.parse_args(argv)
    kind = args.device.type
    args.models = list(dict.fromkeys(itertools.chain(*args.models)))
    args.dtypes = args.dtypes or DTYPES[kind]
    args.modes = args.modes or MODES[kind]
    args.batch_size = args.batch_size or BATCH_SIZES[kind]
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    settings = Settings(args.device, args.batch_size, args.threads, args.min_time)
    described = {
        "models": args.models,
        "tasks": list(args.tasks),
        "dtypes": list(args.dtypes),
        "modes": list(args.modes),
        "batch_size": args.batch_size,
        "min_time": args.min_time,
        "compiled_operator": benchmarking.has_kernel(args.device),
    }
    record = benchmarking.describe_run("model", args.device, described)
    benchmarking.write_heading(record)
    write(LEGEND.format(memory=MEMORY[args.device.type]))
    for kind in itertools.product(args.tasks, args.dtypes, args.modes):
        write(f"\n{', '.join(kind)}, batch {args.batch_size}")
        for model in args.models:
            case = Case(*kind, model)
            result = measure_isolated(case, settings, args.timeout)
            write(f"{model:34}{cell(result)}")
            record["results"].append({**case._asdict(), **result})
            benchmarking.save(record, args.output)
    benchmarking.finish(record, draw, args.output)


if __name__ == "__main__":
    main()
