"""Shared code of the benchmarks: timing, the description of the machine, options and files."""

import argparse
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch

from ops_dcnv4 import choose_backend

Input = TypeVar("Input")
PACKAGES = ("torch", "torchvision", "timm", "ops-dcnv4", "DCNv4", "onedl-mmcv", "mmcv")
WARM_UP_CALLS, MIN_CALLS, MAX_CALLS = 3, 5, 1000


class Timing(NamedTuple):
    """Time per call, in seconds."""

    seconds: float  # median
    low: float  # first quartile
    high: float  # third quartile
    calls: int


def is_unsteady(result: dict) -> bool:
    """Return whether the quartiles are so far apart that the machine was probably shared."""
    return result["high"] - result["low"] > 0.2 * result["seconds"]


def time_each(steps: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Return the seconds of each step: between CUDA events on a GPU, by the clock elsewhere."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for step in steps:
            step()
            marks.append(time.perf_counter())
        return [end - start for start, end in itertools.pairwise(marks)]
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in steps]
    torch.cuda.synchronize(device)
    for step, (start, end) in zip(steps, events, strict=True):
        start.record()
        step()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in events]


class Measurement(Generic[Input]):
    """Timing of a step on inputs that take turns.

    Args:
        prepare: Returns the step for an input. Not timed itself.
        inputs: Inputs of the steps.
        device: Device on which the steps run.
        min_time: Total time to measure, in seconds, within limits for the number of calls.
    """

    def __init__(
        self,
        prepare: Callable[[Input], Callable[[], object]],
        inputs: Sequence[Input],
        device: torch.device,
        min_time: float,
    ) -> None:
        self.prepare, self.device, self.round = prepare, device, len(inputs)
        self.inputs = itertools.cycle(inputs)
        warm_up = [prepare(next(self.inputs)) for _ in range(WARM_UP_CALLS)]
        estimate = max(time_each(warm_up, device)[-1], 1e-7)
        self.calls = min(max(MIN_CALLS, math.ceil(min_time / estimate)), MAX_CALLS)
        self.times: list[float] = []

    def advance(self, share: float) -> None:
        """Time as many calls as are missing to `share` of all calls, in whole rounds of inputs."""
        while len(self.times) < share * self.calls:
            # Prepare the whole round first, so that no step finds its input in a cache.
            count = min(self.round, self.calls - len(self.times))
            steps = [self.prepare(next(self.inputs)) for _ in range(count)]
            self.times += time_each(steps, self.device)

    @property
    def timing(self) -> Timing:
        """Return the median and the quartiles of the calls so far."""
        low, median, high = statistics.quantiles(self.times, n=4)
        return Timing(median, low, high, len(self.times))


def measure(
    prepare: Callable[[Input], Callable[[], object]],
    inputs: Sequence[Input],
    device: torch.device,
    min_time: float,
) -> Timing:
    """Time a step on inputs that take turns; arguments as in :class:`Measurement`."""
    measurement = Measurement(prepare, inputs, device, min_time)
    measurement.advance(1)
    return measurement.timing


def cache_bytes(device: torch.device) -> int:
    """Return the size of the last-level cache, or 32 MiB if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [
        int(file.read_text().strip().removesuffix("K")) * 1024
        for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(sizes, default=32 * 2**20)


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes read and written per second by a copy that does not fit in the caches."""
    size = max(8 * cache_bytes(device), 256 * 2**20)
    buffers = [torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2)]
    timing = measure(lambda pair: lambda: pair[1].copy_(pair[0]), [buffers], device, min_time=0.5)
    return 2 * size / timing.seconds


def _output_of(*command: str) -> str | None:
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def describe_machine(device: torch.device) -> dict:
    """Return the properties of the machine that affect the results."""
    machine = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_at_start": round(os.getloadavg()[0], 2),  # other work would invalidate the results
    }
    if device.type == "cuda":
        query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        driver = _output_of(*query)
        machine["gpu"] = torch.cuda.get_device_name(device)
        machine["driver"] = driver.splitlines()[0] if driver else None
        machine["cuda"] = torch.version.cuda
    return machine


def machine_name(machine: dict) -> str:
    """Return a name for titles: the GPU, or the CPU and the number of threads."""
    threads = machine["threads"]
    return machine.get("gpu") or f"{machine['cpu']}, {threads} thread{'s' * (threads > 1)}"


def describe_software() -> dict:
    """Return the versions of the packages and the commit, marked if files have changed since."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    commit = _output_of("git", "rev-parse", "--short", "HEAD")
    if commit:
        changed = _output_of("git", "status", "--porcelain", "--untracked-files=no")
        versions["commit"] = commit + " with changes" * bool(changed)
    return versions


def describe_run(benchmark: str, device: torch.device, settings: dict) -> dict:
    """Return the record of a run, to which the results are added."""
    return {
        "benchmark": benchmark,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(device),
        "versions": describe_software(),
        "settings": settings,
        "results": [],
    }


def has_kernel(device: torch.device) -> bool:
    """Return whether the compiled operators run on the device, not Triton or the reference."""
    return choose_backend(device) == "compiled"


def reason(error: Exception) -> str:
    """Return why a measurement failed, for tables; without the paths that messages may contain."""
    for known in ("out of memory", "can't allocate memory", "not implemented"):
        if known in str(error):
            return known
    return type(error).__name__


def slug(name: str) -> str:
    """Return `name` in letters, digits and hyphens, without trademark signs."""
    plain = re.sub(r"\((?:r|tm)\)|\b(?:cpu|processor)\b", " ", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def output_files(record: dict, folder: Path) -> tuple[Path, Path]:
    """Return the JSON file and the chart of a run, named after benchmark and machine."""
    stem = folder / f"{record['benchmark']}_{slug(machine_name(record['machine']))}"
    return stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".png")


def save(record: dict, folder: Path) -> None:
    """Write the results so far, so that an interrupted run keeps them."""
    folder.mkdir(parents=True, exist_ok=True)
    output_files(record, folder)[0].write_text(json.dumps(record, indent=1) + "\n")


def finish(record: dict, draw: Callable[[dict, Path], None], folder: Path) -> None:
    """Draw the chart of a run and write the names of the files."""
    json_file, chart = output_files(record, folder)
    draw(record, chart)
    write(f"\nwritten: {json_file} and {chart.name}")


def write(line: str) -> None:
    """Write a line to standard output at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def write_heading(record: dict) -> None:
    """Write the machine, the date and the versions of a run."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    machine = record["machine"]
    write(f"{machine_name(machine)}; {record['date']}; load {machine['load_at_start']}\n{versions}")


def positive(kind: type) -> Callable[[str], int | float]:
    """Return an argparse type for numbers above zero."""

    def parse(text: str) -> int | float:
        try:
            number = kind(text)
        except ValueError:
            number = 0
        if not 0 < number < math.inf:
            wanted = "integer" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} must be a positive {wanted}")
        return number

    return parse


def parse_device(text: str) -> torch.device:
    """Convert `auto`, `cpu` or `cuda` to a device; an argparse type."""
    accepted = ["auto", "cpu"] + ["cuda"] * torch.cuda.is_available()
    if text not in accepted:
        raise argparse.ArgumentTypeError(f"{text!r} must be one of {', '.join(accepted)} here")
    return torch.device(accepted[-1] if text == "auto" else text)


def add_common_options(parser: argparse.ArgumentParser, min_time: float) -> None:
    """Add the options that all benchmarks have."""
    parser.add_argument("--device", type=parse_device, default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=positive(int), default=torch.get_num_threads())
    parser.add_argument(
        "--min-time",
        type=positive(float),
        default=min_time,
        metavar="SECONDS",
        help=f"of each measurement, default {min_time}",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output/benchmarks"),
        metavar="DIR",
        help="of the JSON file and the chart, default %(default)s",
    )
