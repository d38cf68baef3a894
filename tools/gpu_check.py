"""Test and benchmark the operators and models on the GPU of this machine, within a time limit.

python -m tools.gpu_check --seconds 800 --output output/gpu-check

Works without a network and installs nothing: it needs Python >= 3.11 with torch, pytest, hypothesis
and numpy, and leaves out the steps for which other packages or programs are missing. The operators
are compiled into a temporary folder. Without a GPU, the same steps run on the CUDA emulator and the
CPU. The exit status is 0 if every step that ran passed, and 1 if one failed or was stopped.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tools.gpu_check_steps import ROOT, Check, Step, say

REQUIRED = ("torch", "numpy", "pytest", "hypothesis")
MODELS = ("timm", "torchvision", "huggingface_hub", "safetensors", "yaml", "tqdm", "filelock")
BENCHMARKS = (*MODELS, "matplotlib")
OPTIONAL = ("setuptools", "ninja", "triton", "expecttest", *BENCHMARKS, "DCNv4", "mmcv")

GRACE = 5.0  # seconds between SIGINT, after which programs save what they have, and SIGKILL
LEAST = 15.0  # a step is not started with fewer seconds left
PROBE_SECONDS = 120.0

# Tests of the forward and backward passes in every dtype, which run first.
FIRST = (
    "expected_kernels",
    "published_operator",
    "sizes_with_specialized_kernels",
    "other_sizes",
    "sizes_of_the_models",
    "sizes_of_a_detector",
    "16_bit_results",
    "image_in_a_batch",
)
SANITIZERS = {"memcheck": 4, "racecheck": 3, "initcheck": 3, "synccheck": 2}


# The machine


def probe() -> None:
    """Write the versions and the GPU as JSON; runs in a process of its own, as drivers may hang."""
    names = (*REQUIRED, *OPTIONAL)
    facts: dict[str, Any] = {
        "gpu": None,
        "python": platform.python_version(),
        "modules": [name for name in names if importlib.util.find_spec(name)],
        "cuda_home": None,
    }
    if "torch" in facts["modules"]:
        import torch
        from torch.utils import cpp_extension

        facts |= {"torch": torch.__version__, "cuda": torch.version.cuda}
        facts["cuda_home"] = cpp_extension.CUDA_HOME
        if torch.cuda.is_available():
            gpus = range(torch.cuda.device_count())
            capabilities = {torch.cuda.get_device_capability(gpu) for gpu in gpus}
            facts["gpu"] = ", ".join(map(torch.cuda.get_device_name, gpus))
            facts["compute_capability"] = ";".join(f"{a}.{b}" for a, b in sorted(capabilities))
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            facts["driver"] = _output(query).partition("\n")[0]
    if "triton" in facts["modules"]:
        import triton

        facts["triton"] = triton.__version__
    say(json.dumps(facts))


def _output(command: Sequence[str]) -> str:
    """Return what a program writes, or an empty string if it is missing or fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()
    return ""


def examine_machine(seconds: float) -> dict[str, Any]:
    """Return the facts about this machine that the report contains, within a number of seconds.

    Raises:
        SystemExit: After one line, if torch cannot be used or packages are missing.
    """
    code = "from tools.gpu_check import probe; probe()"
    command = [sys.executable, "-c", code]
    try:
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        fail(f"torch did not return the GPU's properties within {seconds:g} seconds")
    if process.returncode:
        last = process.stderr.strip().rpartition("\n")[2]
        fail(f"{sys.executable} cannot use torch: {last}")
    facts = json.loads(process.stdout.splitlines()[-1])
    if absent := [name for name in REQUIRED if name not in facts["modules"]]:
        fail(f"{sys.executable} has no {', '.join(absent)}")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    if not facts["gpu"] and not hidden and "GPU" in _output(["nvidia-smi", "-L"]):
        fail(f"torch {facts['torch']} (CUDA {facts['cuda']}) cannot use the GPU of this machine")
    describe = ("git", "describe", "--always", "--exclude=*", "--dirty= with changes")
    facts["commit"] = _output(describe) or None
    facts["system"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    facts["compute_sanitizer"] = find_sanitizer(facts.pop("cuda_home"))
    return facts


def find_sanitizer(cuda_home: str | None) -> str | None:
    """Return the path of compute-sanitizer, which toolkits have beside nvcc."""
    homes = [cuda_home, os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        homes.append(str(Path(nvcc).resolve().parents[1]))
    folders = [f"{home}/{part}" for home in homes if home for part in ("bin", "compute-sanitizer")]
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *folders])
    return shutil.which("compute-sanitizer", path=path)


# The steps


def make_steps(
    facts: dict[str, Any], output: Path, work: Path, architectures: str | None
) -> list[Step]:
    """Return the steps for this machine by priority.

    Args:
        facts: The facts about the machine.
        output: Folder of the report.
        work: Folder for the build and other temporary files.
        architectures: GPU architectures to compile for; by default, those of the GPUs.
    """
    steps = [build_step(facts, work, architectures or facts.get("compute_capability"))]
    if facts["gpu"]:
        steps += [*gpu_tests(work), *sanitizer_steps(facts["compute_sanitizer"])]
        steps += gpu_benchmarks(output)
    else:
        steps += [*cpu_tests(work), *sanitizer_steps(None), *cpu_runs(output)]
    for step in steps:
        absent = [name for name in step.needs if name not in facts["modules"]]
        if absent and not step.missing:
            step.missing = f"needs {', '.join(absent)}"
    return steps


def build_step(facts: dict[str, Any], work: Path, architectures: str | None) -> Step:
    """Return the step that compiles the operators into `work`/lib."""
    command = [sys.executable, "setup.py", "egg_info", "--egg-base", str(work)]
    command += ["build", "--build-base", str(work / "build")]
    env = {"OPS_DCNV4_REQUIRE_COMPILED": "1"}
    env |= {"TORCH_CUDA_ARCH_LIST": architectures or ""} if facts["gpu"] else {"FORCE_CPU": "1"}
    return Step(
        "build",
        [*command, "--build-lib", str(work / "lib")],
        share=34,
        kind="build",
        needs=("setuptools",),
        compiled=False,
        env=env,
        folder=work / "lib",
    )


def pytest_step(work: Path, name: str, share: float, *arguments: str, **options: Any) -> Step:
    """Return a step that runs tests, without plugins that may be installed."""
    command = [sys.executable, "-m", "pytest", "-p", "tools.pytest_outcomes", "-p"]
    command += ["no:cacheprovider", "--outcomes", str(work / f"{name}.jsonl"), "-v", "--tb=short"]
    return Step(name, [*command, *arguments], share, kind="tests", **options)


def in_folder(folder: str, *modules: str) -> list[str]:
    """Return the paths of test modules."""
    return [f"tests/{folder}/test_{module}.py" for module in modules]


def registration_tests(work: Path, folder: str) -> list[Step]:
    """Return the tests of torch.compile and the like; opcheck needs another package."""
    modules = in_folder(folder, "registration", "attention_registration")
    opcheck = [f"{module}::test_registration" for module in modules]
    deselect = [f"--deselect={test}" for test in opcheck]
    return [
        pytest_step(work, "registration", 4, *modules, *deselect),
        pytest_step(work, "opcheck", 2, *opcheck, needs=("expecttest",)),
    ]


def gpu_tests(work: Path) -> list[Step]:
    """Return the tests of tests/gpu by priority."""
    operators = in_folder("gpu", "ops", "attention")
    triton = in_folder("gpu", "triton", "triton_attention")
    first = " or ".join(FIRST)
    on_triton: dict[str, Any] = {"needs": ("triton",), "compiled": False}
    return [
        pytest_step(work, "operators", 10, *operators, "-k", first),
        pytest_step(work, "triton", 8, *triton, "-k", first, **on_triton),
        pytest_step(work, "models", 6, *in_folder("gpu", "model"), needs=MODELS),
        pytest_step(work, "operators-more", 6, *operators, "-k", f"not ({first})"),
        pytest_step(work, "triton-more", 8, *triton, "-k", f"not ({first})", **on_triton),
        *registration_tests(work, "gpu"),
    ]


def cpu_tests(work: Path) -> list[Step]:
    """Return the tests that correspond to those of tests/gpu on a machine without a GPU."""
    operators, first = in_folder("cuda_model", "ops", "attention"), " or ".join(FIRST)
    emulator: dict[str, Any] = {"needs": ("filelock",)}
    if not shutil.which(os.environ.get("CXX", "g++")):
        emulator["missing"] = "needs g++"
    more = [*operators, *in_folder("cuda_model", "model"), "-k", f"not ({first})"]
    triton = in_folder("ops_dcnv4", "triton")
    return [
        pytest_step(work, "operators", 10, *operators, "-k", first, **emulator),
        pytest_step(work, "triton", 8, *triton, needs=("triton",), compiled=False),
        pytest_step(work, "models", 6, *in_folder("flash_internimage", "backbone"), needs=MODELS),
        pytest_step(work, "operators-more", 6, *more, **emulator),
        *registration_tests(work, "ops_dcnv4"),
    ]


def sanitizer_steps(sanitizer: str | None) -> list[Step]:
    """Return the steps that run the kernels under NVIDIA's checkers."""
    program = [sys.executable, "-m", "tests.gpu.sanitize"]
    missing = "" if sanitizer else "needs a GPU and compute-sanitizer"
    return [
        Step(
            tool,
            [str(sanitizer), "--tool", tool, "--error-exitcode", "1", *program],
            share,
            missing=missing,
        )
        for tool, share in SANITIZERS.items()
    ]


def benchmark_step(
    name: str, share: float, module: str, folder: Path, *arguments: str, needs: Sequence[str] = ()
) -> Step:
    """Return a step that runs a benchmark."""
    command = [sys.executable, "-m", f"benchmarks.{module}", "--output", str(folder), *arguments]
    return Step(name, command, share, kind="benchmark", needs=needs or BENCHMARKS, folder=folder)


def gpu_benchmarks(output: Path) -> list[Step]:
    """Return benchmarks in the order of their importance; compiling models takes longest."""
    folder, modes = output / "benchmarks", ("--timeout", "120", "--min-time", "1", "--modes")
    return [
        benchmark_step(
            "bench-operators", 5, "op", folder, "--min-time", "0.1", "--skip", "reference"
        ),
        benchmark_step("bench-models", 3, "model", folder, *modes, "eager"),
        benchmark_step("bench-compiled", 2, "model", output / "compiled", *modes, "compiled"),
    ]


def cpu_runs(output: Path) -> list[Step]:
    """Return the shortest forms of the remaining steps, without a checker."""
    folder, quick = output / "benchmarks", ("--device", "cpu", "--threads", "1", "--min-time")
    operators = ("--shapes", "1x7x7x512", "dino-decoder")
    models = ("--models", "flash_internimage_nano", "--tasks", "inference", "--batch-size", "1")
    return [
        Step("small-run", [sys.executable, "-m", "tests.gpu.sanitize", "--device", "cpu"], 4),
        benchmark_step("bench-operators", 5, "op", folder, *quick, "1e-3", *operators),
        benchmark_step("bench-models", 3, "model", folder, *quick, "0.1", *models),
    ]


# The program


def fail(message: str) -> NoReturn:
    """End the program because of wrong arguments or missing packages."""
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(2)


def time_limit(text: str) -> float:
    """Parse the time limit."""
    smallest = 2 * LEAST
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not smallest <= seconds < math.inf:
        message = f"must be a number of seconds of at least {smallest:g}, got {text!r}"
        raise argparse.ArgumentTypeError(message)
    return seconds


def architectures(text: str) -> str:
    """Parse GPU architectures."""
    if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?(;\d+\.\d[af]?(\+PTX)?)*", text):
        raise argparse.ArgumentTypeError(f"must be like 9.0 or 8.0;9.0+PTX, got {text!r}")
    return text


class Parser(argparse.ArgumentParser):
    """Parser that writes one line about wrong arguments, without the usage."""

    def error(self, message: str) -> NoReturn:
        """End the program."""
        fail(message)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(prog="python -m tools.gpu_check", description=__doc__.splitlines()[0])
    option = parser.add_argument
    default = "default: %(default)s"
    option("--seconds", type=time_limit, default=800, metavar="T", help=f"time limit, {default}")
    text = f"folder of the report and the logs, {default}"
    option("--output", type=Path, default=Path("output/gpu-check"), metavar="DIR", help=text)
    text = "GPU architectures to compile for, such as 9.0; default: those of the GPUs"
    option("--arch", type=architectures, metavar="LIST", help=text)
    option("--steps", nargs="+", metavar="STEP", help="run these steps only")
    option("--skip", nargs="+", default=[], metavar="STEP", help="leave out these steps")
    text = "keep the build in this folder, and use the one that is there; default: a temporary one"
    option("--build-dir", type=Path, metavar="DIR", help=text)
    return parser.parse_args(argv)


def choose_steps(steps: list[Step], only: list[str] | None, skip: list[str]) -> list[Step]:
    """Return the steps that were asked for, in their order."""
    names = [step.name for step in steps]
    for option, given in (("--steps", only or []), ("--skip", skip)):
        if unknown := [name for name in given if name not in names]:
            fail(f"{option} must be among {', '.join(names)} here, got {unknown[0]!r}")
    chosen = [step for step in steps if step.name in (only or names) and step.name not in skip]
    return chosen or fail("--steps and --skip leave no step to run")


def describe(facts: dict[str, Any]) -> str:
    """Return one line about the machine."""
    gpu = "no GPU: the CUDA emulator and the CPU instead"
    if facts["gpu"]:
        capability, driver = facts["compute_capability"], facts["driver"] or "unknown"
        gpu = f"{facts['gpu']} (compute capability {capability}, driver {driver})"
    names = {"python": "Python", "torch": "torch", "cuda": "CUDA", "triton": "triton"}
    versions = [f"{name} {facts[key]}" for key, name in names.items() if facts.get(key)]
    return ", ".join([gpu, *versions, f"commit {facts['commit'] or 'unknown'}"])


def main(argv: list[str] | None = None) -> None:
    """Run the check."""
    start = time.monotonic()
    args = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    output = args.output.resolve()
    try:
        output.mkdir(parents=True, exist_ok=True)
        if args.build_dir:
            args.build_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot create the folder {error.filename}: {error.strerror}")
    facts = examine_machine(min(PROBE_SECONDS, args.seconds))
    with contextlib.ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True)
        work = args.build_dir.resolve() if args.build_dir else Path(stack.enter_context(temporary))
        steps = make_steps(facts, output, work, args.arch)
        steps = choose_steps(steps, args.steps, args.skip)
        check = Check(steps, facts, output, work, args.seconds, GRACE, LEAST, start)
        say(describe(facts))
        passed = check.run()
    say(f"\nreport: {args.output / 'report.json'}\n\n{check.table()}")
    raise SystemExit(0 if passed else 1)


if __name__ == "__main__":
    main()
