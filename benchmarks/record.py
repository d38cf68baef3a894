"""The record of a benchmark run: machine, versions, settings and results, in a JSON file."""

import argparse
import contextlib
import functools
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch
from torch.utils import collect_env

from flash_internimage.files import require_writable, write_text
from ops_dcnv4 import choose_backend

PACKAGES = ("torch", "torchvision", "timm", "ops-dcnv4", "DCNv4", "onedl-mmcv", "mmcv")
write = functools.partial(print, flush=True)


def start(benchmark: str, device: torch.device, settings: dict) -> dict:
    """Write machine, date and versions; return the record, to which the results are added."""
    machine, versions = describe_machine(device), describe_software()
    record = {
        "benchmark": benchmark,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "versions": versions,
        "settings": settings | {"backend": choose_backend(device)},
        "results": [],
    }
    write(f"{machine_name(machine)}; {record['date']}; load {machine['load_at_start']}")
    write(", ".join(f"{name} {version}" for name, version in versions.items()))
    write(f"backend of the operators: {choose_backend(device)}")
    return record


def describe_machine(device: torch.device) -> dict:
    """Return the properties of the machine that affect the results."""
    cpu_info = Path("/proc/cpuinfo")  # unlike lscpu, independent of the language
    cpu = re.search(r"model name\s*: (.+)", cpu_info.read_text() if cpu_info.exists() else "")
    machine = {
        "cpu": cpu[1] if cpu else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_at_start": round(os.getloadavg()[0], 2),  # other work would invalidate the results
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
        machine["driver"] = collect_env.get_nvidia_driver_version(collect_env.run)
        machine["cuda"] = torch.version.cuda
    return machine


def describe_software() -> dict[str, str]:
    """Return the versions of the packages and the commit, marked if files have changed since."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    describe = ("git", "describe", "--always", "--exclude=*", "--dirty= with changes")
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or not a clone
        output = subprocess.check_output(describe, cwd=Path(__file__).parent, text=True)
        versions["commit"] = output.strip()
    return versions


def machine_name(machine: dict) -> str:
    """Return a name for titles: the GPU, or the CPU and the number of threads."""
    threads = machine["threads"]
    return machine.get("gpu") or f"{machine['cpu']}, {threads} thread{'s' * (threads > 1)}"


def results_file(record: dict, folder: Path) -> Path:
    """Return the path of the JSON file, which is named after benchmark and machine."""
    name = machine_name(record["machine"]).lower()
    name = re.sub(r"\((?:r|tm)\)|\b(?:cpu|processor)\b", " ", name)
    slug = re.sub(r"[^a-z0-9]+", "-", name).strip("-")
    return folder / f"{record['benchmark']}_{slug}.json"


def save(record: dict, folder: Path) -> Path:
    """Write the results so far to the JSON file; return its path."""
    file = results_file(record, folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(record, indent=1) + "\n")
    return file


def positive(kind: type) -> Callable[[str], int | float]:
    """Return an argparse type for numbers above zero."""

    def parse(text: str) -> int | float:
        try:
            number = kind(text)
        except ValueError:
            number = 0
        if not 0 < number < math.inf:
            noun = "integer" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"must be a positive {noun}, got {text!r}")
        return number

    return parse


def add_common_options(parser: argparse.ArgumentParser, min_time: float) -> None:
    """Add the options that all benchmarks share."""
    add_machine_options(parser)
    text = "measuring time of each case in seconds, default: %(default)s"
    parser.add_argument(
        "--min-time", type=positive(float), default=min_time, metavar="T", help=text
    )


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the device, the CPU threads and the output folder."""
    option = parser.add_argument
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    threads, folder = torch.get_num_threads(), Path("output/benchmarks")
    default = "default: %(default)s"
    text = f"CPU threads, {default}"
    option("--device", choices=devices, default=devices[-1], help=default)
    option("--threads", type=positive(int), default=threads, metavar="N", help=text)
    text = f"folder of the JSON file and the chart, {default}"
    option("--output", type=_output_folder, default=folder, metavar="DIR", help=text)


def _output_folder(text: str) -> Path:
    folder = Path(text)
    try:
        require_writable(folder, "the folder")
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return folder
