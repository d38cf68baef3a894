"""Measure images per second and peak memory of FlashInternImage, ConvNeXt and Swin.

    python -m benchmarks.model
    python -m benchmarks.model --models small base --dtypes bfloat16 --modes eager compiled

Each measurement runs in a separate process, so that a failure does not affect the others.
"""

import argparse
import contextlib
import difflib
import itertools
import logging
import multiprocessing
import re
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.models import model_entrypoint
from torch import Tensor, nn

from benchmarks import charts, predict, record, timing
from benchmarks.record import write
from flash_internimage import dropin

_logger = logging.getLogger(__name__)

TASKS = ("inference", "training")
SIZES = {
    size: (f"flash_internimage_{size}", f"convnext_{size}", f"swin_{size}_patch4_window7_224")
    for size in ("tiny", "small", "base")
}
DTYPES = {"cpu": ("float32",), "cuda": ("float32", "bfloat16")}
MODES = {"cpu": ("eager",), "cuda": ("eager", "compiled")}
MEMORY_FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
DROPIN = "+dcnv4"  # after the name of a model whose layers are replaced by DCNv4
REPLACEABLE = ("timm.models.convnext", "timm.models.vision_transformer")
WARM_UP = 3  # steps before the capture of a CUDA graph
BATCH_SIZES = {"cpu": 4, "cuda": 64}
LEGEND = f"""
Parameters, resolution (the model's default), images per second (median; ~ marks an interquartile
range above {timing.UNSTEADY:.0%}) and peak memory. In parentheses: why there is no measurement.
Inference: weights and images in the dtype. Training: forward and backward without an optimizer
step, float32 weights, autocast to other dtypes. Random images in {{memory_format}} memory format.
Peak memory: {{memory}}. The last column is the prediction for an NVIDIA H200."""
MEMORY = {
    "cuda": "allocated on the GPU, including weights (unknown for graphs)",
    "cpu": "growth of the process, including weights (unknown if compiled)",
}


class Case(NamedTuple):
    """A case to measure."""

    task: str
    dtype: str
    mode: str
    model: str


def create(name: str) -> nn.Module:
    """Create a timm model; the suffix "+dcnv4" replaces its layers by DCNv4."""
    original = name.removesuffix(DROPIN)
    network = timm.create_model(original)
    return network if original == name else dropin.replace(network)


def build(
    case: Case, device: torch.device, batch_size: int, memory_format: str = "channels_last"
) -> tuple[nn.Module, Tensor]:
    """Return the model of a case and images for it."""
    model = create(case.model).train(case.task == "training")
    images = torch.randn(batch_size, *resolve_model_data_config(model)["input_size"])
    dtype = getattr(torch, case.dtype) if case.task == "inference" else torch.float32
    layout = MEMORY_FORMATS[memory_format]
    # torch's overloads of Module.to lack memory_format.
    model = model.to(device, dtype, memory_format=layout)  # type: ignore[call-overload]
    return model, images.to(device, dtype, memory_format=layout)


def make_step(case: Case, model: nn.Module, images: Tensor) -> Callable[[], None]:
    """Return the step to time, compiled or as a CUDA graph if requested."""
    call = torch.compile(model) if case.mode == "compiled" else model
    targets = torch.randint(10, (len(images),), device=images.device)
    dtype = getattr(torch, case.dtype)

    @torch.inference_mode()
    def infer() -> None:
        call(images)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(call(images), targets)
        loss.backward()

    step = infer if case.task == "inference" else train
    return Replay(step) if case.mode == "graph" else step


class Replay:
    """A step that is captured in a CUDA graph and replayed by calls.

    Args:
        step: The step; it is kept because the graph reads its tensors.
    """

    def __init__(self, step: Callable[[], None]) -> None:
        self.step, self.graph = step, torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self.graph):
            step()

    def __call__(self) -> None:
        """Replay the step."""
        self.graph.replay()


def resident_bytes(field: str) -> int | None:
    """Return VmRSS (current) or VmHWM (peak) of this process, or None if it is unknown."""
    with contextlib.suppress(OSError):
        if found := re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text()):
            return int(found[1]) * 1024
    return None


def prepare_process(args: argparse.Namespace) -> torch.device:
    """Set seed, threads and autotuning of this process; return the device."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    return torch.device(args.device)


def measure(case: Case, args: argparse.Namespace) -> dict:
    """Measure speed and peak memory of one case; meant for a separate process."""
    device = prepare_process(args)
    before = resident_bytes("VmRSS")
    model, images = build(case, device, args.batch_size, args.memory_format)
    predicted = predict.model_seconds(model, images, getattr(torch, case.dtype), case.mode)
    step = make_step(case, model, images)
    step()  # compiles, autotunes, and makes the lasting allocations
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    times = timing.measure(step, args.min_time)
    after = resident_bytes("VmHWM") if case.mode == "eager" else None  # without the compiler
    peak = after - before if before and after else None
    if device.type == "cuda":
        # The memory of a graph does not count as allocated.
        peak = None if case.mode == "graph" else torch.cuda.max_memory_allocated(device)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "image_size": images.shape[-1],
        "images_per_second": args.batch_size / times["seconds"],
        "predicted_images_per_second": args.batch_size / predicted if predicted else None,
        "peak_bytes": peak,
        **times,
    }


def measure_or_explain(function: Callable, case: Sequence[str], args: argparse.Namespace) -> dict:
    """Return the result of a case, or why there is none; the time limit ends the process."""
    signal.setitimer(signal.ITIMER_REAL, args.timeout)
    try:
        return {"status": "ok", **function(case, args)}
    except Exception as error:  # compilers, drivers and models may raise anything
        _logger.warning("%s failed: %s", " ".join(case), error)
        return {"status": "failed", "note": timing.reason(error)}


def measure_isolated(
    case: Sequence[str], args: argparse.Namespace, function: Callable = measure
) -> dict:
    """Return the result of a case, measured in a new process, or why there is none."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "benchmarks.charts", "benchmarks.timing"])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        try:
            return pool.submit(measure_or_explain, function, case, args).result()
        except BrokenProcessPool:  # killed by the system, usually out of memory, or by the timer
            return {"status": "failed", "note": f"killed, or over {args.timeout:g} s"}


def cell(result: dict) -> str:
    """Format a result for the table."""
    if result["status"] != "ok":
        return f"({result['note']})"
    peak = "-" if result["peak_bytes"] is None else f"{result['peak_bytes'] / 2**30:.2f} GiB"
    speed = "~" * timing.is_unsteady(result) + f"{result['images_per_second']:.1f} images/s"
    predicted = result["predicted_images_per_second"]
    size = f"{result['parameters'] / 1e6:6.1f} M {result['image_size']:6}"
    return f"{size}{speed:>20}{peak:>14}" + (f"{predicted:10.1f}" if predicted else f"{'-':>10}")


def can_replace(name: str) -> bool:
    """Return whether `dropin.replace` supports the timm model of that name."""
    return model_entrypoint(name).__module__ in REPLACEABLE


def parse_model(text: str) -> tuple[str, ...]:
    """Return the models that a size stands for, or the model of that name."""
    if text in SIZES:
        return SIZES[text]
    original = text.removesuffix(DROPIN)
    if timm.is_model(original):
        if original != text and not can_replace(original):
            raise argparse.ArgumentTypeError(
                f"must be a ConvNeXt or vision transformer before {DROPIN}, got {text!r}"
            )
        return (text,)
    close = difflib.get_close_matches(text, [*SIZES, *timm.list_models()], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise argparse.ArgumentTypeError(
        f"must be {', '.join(SIZES)} or the name of a timm model, got {text!r}{hint}"
    )


def add_options(parser: argparse.ArgumentParser, batch_sizes: dict[str, int]) -> None:
    """Add the options that say what to measure of each model."""
    option = parser.add_argument
    option("--tasks", nargs="+", choices=TASKS, default=TASKS, help="default: both")
    dtypes = "default: float32; on a GPU also bfloat16"
    option("--dtypes", nargs="+", choices=("float32", "bfloat16", "float16"), help=dtypes)
    modes = "default: eager; on a GPU also compiled"
    option("--modes", nargs="+", choices=("eager", "compiled", "graph"), help=modes)
    default = "default: %(default)s"
    option("--memory-format", choices=MEMORY_FORMATS, default="channels_last", help=default)
    batch_size = "default: {cpu}; on a GPU {cuda}".format(**batch_sizes)
    option("--batch-size", type=record.positive(int), metavar="N", help=batch_size)
    timeout = "limit for each measurement, default: %(default)s"
    positive = record.positive(float)
    option("--timeout", type=positive, default=600, metavar="SECONDS", help=timeout)
    record.add_common_options(parser, min_time=3)


def fill_in(
    args: argparse.Namespace, parser: argparse.ArgumentParser, batch_sizes: dict[str, int]
) -> argparse.Namespace:
    """Fill in the defaults of the device."""
    args.dtypes = args.dtypes or DTYPES[args.device]
    args.modes = args.modes or MODES[args.device]
    args.batch_size = args.batch_size or batch_sizes[args.device]
    if "graph" in args.modes and args.device == "cpu":
        parser.error("argument --modes: graph needs a GPU")
    return args


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line and fill in the defaults of the device."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.model", description=__doc__.splitlines()[0]
    )
    tiny = [SIZES["tiny"]]
    models = (
        "names of timm models, with +dcnv4 after a ConvNeXt or vision transformer to replace its "
        "layers by DCNv4; tiny, small or base for one of each family; default: tiny"
    )
    parser.add_argument(
        "--models", nargs="+", type=parse_model, default=tiny, metavar="MODEL", help=models
    )
    add_options(parser, BATCH_SIZES)
    args = fill_in(parser.parse_args(argv), parser, BATCH_SIZES)
    args.models = list(dict.fromkeys(itertools.chain(*args.models)))
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    names = ("models", "tasks", "dtypes", "modes", "batch_size", "memory_format", "min_time")
    run = record.start("model", torch.device(args.device), {n: getattr(args, n) for n in names})
    write(LEGEND.format(memory=MEMORY[args.device], memory_format=args.memory_format))
    for kind in itertools.product(args.tasks, args.dtypes, args.modes):
        write(f"\n{', '.join(kind)}, batch size {args.batch_size}")
        for model in args.models:
            case = Case(*kind, model)
            result = measure_isolated(case, args)
            write(f"{model:34}{cell(result)}")
            run["results"].append({**case._asdict(), **result})
            file = record.save(run, args.output)
    write(f"\nresults: {file}\nchart: {charts.draw(file)}")


if __name__ == "__main__":
    main()
