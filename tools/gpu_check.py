"""Test and benchmark the operators and models on the GPU of this machine, within a time limit.

python -m tools.gpu_check --seconds 480 --output output/gpu-check

Works without a network and installs nothing. It needs Python >= 3.11 and torch, numpy, setuptools,
pytest and hypothesis, and leaves out the steps for which other packages or programs are missing.
The operators are compiled into a temporary folder. Without a GPU, the same steps run on the CUDA
emulator and the CPU, with tiny sizes. The exit status is 0 if every step that ran passed, and 1 if
one failed or a test was stopped.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tools.gpu_check_steps import (
    ROOT,
    Check,
    Step,
    read_benchmark,
    read_build,
    read_sanitizer,
    read_tests,
    say,
)

REQUIRED = ("torch", "numpy", "setuptools", "pytest", "hypothesis")
MODELS = ("timm", "torchvision", "huggingface_hub", "safetensors", "yaml", "tqdm", "filelock")
# What each benchmark imports; operators for comparison may be missing.
BENCHMARKS: dict[str, tuple[str, ...]] = {
    "rates": (),
    "op": ("matplotlib",),
    "counters": (),
    "model": (*MODELS, "matplotlib"),
    "tune": ("matplotlib",),
}
OPTIONAL = ("ninja", "triton", "expecttest", *BENCHMARKS["model"], "DCNv4", "mmcv")

LEAST_SECONDS = 30.0
PROBE_SECONDS = 120.0

SANITIZERS = {"memcheck": 4, "racecheck": 3, "initcheck": 2, "synccheck": 1}
LARGE, LARGE_GIB = "beyond_32_bit_indices", 64

# Shapes that are timed first; --skip leaves out what is slow and slower than alternatives.
MAIN_SHAPES = ("64x56x56x128", "64x56x56x128/32", "dino-encoder")
SKIP = ("--skip", "reference", "mmcv PyTorch")


# The machine


def probe() -> None:
    """Write the versions and the GPU as JSON; runs in a process of its own, as drivers may hang."""
    names = (*REQUIRED, *OPTIONAL)
    facts: dict[str, Any] = {
        "gpu": None,
        "python": platform.python_version(),
        "modules": [name for name in names if importlib.util.find_spec(name)],
        "compute_sanitizer": None,
        "ncu": None,
    }
    if "torch" in facts["modules"]:
        import torch
        from torch.utils import cpp_extension

        facts |= {"torch": torch.__version__, "cuda": torch.version.cuda}
        home = cpp_extension.CUDA_HOME or "/usr/local/cuda"
        path = f"{os.environ.get('PATH', os.defpath)}:{home}/bin:{home}/compute-sanitizer"
        path = ":".join([path, *map(str, Path("/opt/nvidia/nsight-compute").glob("*"))])
        facts["compute_sanitizer"] = shutil.which("compute-sanitizer", path=path)
        facts["ncu"] = shutil.which("ncu", path=path)
        if torch.cuda.is_available():
            gpus = range(torch.cuda.device_count())
            capabilities = {torch.cuda.get_device_capability(gpu) for gpu in gpus}
            memory = min(torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus)
            facts["memory_gib"] = round(memory / 2**30)
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
    return facts


# The steps


def make_steps(facts: dict[str, Any], output: Path, work: Path) -> list[Step]:
    """Return the steps for this machine by priority.

    Args:
        facts: The facts about the machine.
        output: Folder of the report.
        work: Folder for the build and other temporary files.
    """
    steps = [build_step(facts, work)]
    if facts["gpu"]:
        steps += [*gpu_tests(facts, output, work), *sanitizer_steps(facts["compute_sanitizer"])]
        steps += gpu_benchmarks(facts, output, work)
    else:
        steps += [*cpu_tests(output), *sanitizer_steps(None), *cpu_runs(output)]
    for step in steps:
        absent = [name for name in step.needs if name not in facts["modules"]]
        if absent and not step.missing:
            step.missing = f"needs {', '.join(absent)}"
    return steps


def architectures(facts: dict[str, Any]) -> dict[str, str]:
    """Return the environment variable that selects what to compile for."""
    return {"TORCH_CUDA_ARCH_LIST": facts["compute_capability"]} if facts["gpu"] else {}


def build_step(facts: dict[str, Any], work: Path) -> Step:
    """Return the step that compiles the operators into `work`/lib."""
    command = [sys.executable, "setup.py", "egg_info", "--egg-base", str(work), "build"]
    command += ["--build-base", str(work / "build"), "--build-lib", str(work / "lib")]
    env = {"OPS_DCNV4_REQUIRE_COMPILED": "1"} | architectures(facts)
    if not facts["gpu"]:
        env["FORCE_CPU"] = "1"
    folder = work / "lib"
    return Step("build", command, 22, read_build, compiled=False, env=env, folder=folder)


def pytest_step(output: Path, name: str, share: float, *arguments: str, **options: Any) -> Step:
    """Return a step that runs tests, without plugins that may be installed."""
    command = [sys.executable, "-m", "pytest", "-p", "tools.pytest_outcomes", "-p"]
    command += ["no:cacheprovider", "--outcomes", str(output / f"{name}.jsonl"), "-v", "--tb=short"]
    return Step(name, [*command, *arguments], share, read_tests, **{"group": "tests"} | options)


def in_folder(folder: str, *modules: str) -> list[str]:
    """Return the paths of test modules."""
    return [f"tests/{folder}/test_{module}.py" for module in modules]


def gpu_tests(facts: dict[str, Any], output: Path, work: Path) -> list[Step]:
    """Return the tests of tests/gpu, which run at the same time, as the CPU limits them.

    Builds of the variants for benchmarks.tune use the other cores meanwhile. The modules of the
    operators begin with the forward and backward passes in every dtype.
    """
    on_triton: dict[str, Any] = {"needs": ("triton",), "compiled": False}
    modules = in_folder("gpu", "registration", "attention_registration")
    opcheck = [f"{module}::test_registration" for module in modules]  # needs another package
    deselect = [f"--deselect={test}" for test in opcheck]
    small = ("-k", f"not {LARGE}")
    threads = {"OMP_NUM_THREADS": "4"}  # for the models on the CPU
    return [
        pytest_step(output, "dcnv4", 4, *in_folder("gpu", "ops"), *small),
        pytest_step(output, "attention", 4, *in_folder("gpu", "attention"), *small),
        pytest_step(output, "triton-dcnv4", 4, *in_folder("gpu", "triton"), **on_triton),
        pytest_step(
            output, "triton-attention", 3, *in_folder("gpu", "triton_attention"), **on_triton
        ),
        pytest_step(output, "models", 3, *in_folder("gpu", "model"), needs=MODELS, env=threads),
        pytest_step(output, "registration", 2, *modules, *deselect),
        pytest_step(output, "opcheck", 1, *opcheck, needs=("expecttest",)),
        tune_step(
            "tune-build", 2, output, work, "--build", group="tests", env=architectures(facts)
        ),
    ]


def cpu_tests(output: Path) -> list[Step]:
    """Return a few tests for each step of a machine with a GPU, on the emulator and the CPU."""
    emulator: dict[str, Any] = {"needs": ("filelock",)}
    if not shutil.which(os.environ.get("CXX", "g++")):
        emulator["missing"] = "needs g++"
    triton = {"needs": ("triton",), "compiled": False, "env": {"TRITON_INTERPRET": "1"}}
    backbone = in_folder("flash_internimage", "backbone")
    registration = in_folder("ops_dcnv4", "registration")
    some = ("-k", "published_operator or published_values")
    return [
        pytest_step(output, "dcnv4", 4, *in_folder("cuda_model", "ops"), *some, **emulator),
        pytest_step(
            output, "attention", 4, *in_folder("cuda_model", "attention"), *some, **emulator
        ),
        pytest_step(output, "triton", 4, *in_folder("ops_dcnv4", "triton"), *some, **triton),
        pytest_step(output, "models", 3, *backbone, *some, needs=MODELS),
        pytest_step(output, "registration", 2, *registration, "-k", "compile_equals_eager"),
    ]


def sanitizer_steps(sanitizer: str | None) -> list[Step]:
    """Return the steps that run the kernels under NVIDIA's checkers."""
    program = [sys.executable, "-m", "tests.gpu.sanitize"]
    missing = "" if sanitizer else "needs a GPU and compute-sanitizer"
    checker = [str(sanitizer), "--error-exitcode", "1", "--tool"]
    return [
        Step(
            tool, [*checker, tool, *program], share, read_sanitizer,
            missing=missing, group="sanitizers",
        )
        for tool, share in SANITIZERS.items()
    ]  # fmt: skip


def benchmark_step(
    name: str, share: float, module: str, output: Path, *arguments: str, **options: Any
) -> Step:
    """Return a step that runs a benchmark; its files are in a folder of its name."""
    folder = output / name
    command = [sys.executable, "-m", f"benchmarks.{module}", "--output", str(folder), *arguments]
    needs = BENCHMARKS[module]
    return Step(name, command, share, read_benchmark, needs, folder=folder, **options)


def tune_step(
    name: str, share: float, output: Path, work: Path, *arguments: str, **options: Any
) -> Step:
    """Return a step that builds or times variants of the kernels."""
    builds = ("--builds", str(work / "tune"))
    return benchmark_step(name, share, "tune", output, *builds, *arguments, **options)


def gpu_benchmarks(facts: dict[str, Any], output: Path, work: Path) -> list[Step]:
    """Return benchmarks in the order of their importance, and at last what needs much memory."""
    ncu = ("--ncu", str(facts["ncu"]))
    missing = "" if facts["ncu"] else "needs ncu"
    quick, models = ("--min-time", "0.05", *SKIP), ("--min-time", "0.3", "--timeout", "120")
    sixteen_bit_first = ("--dtypes", "float16", "bfloat16", "float32")
    one_dtype = (*models, "--dtypes", "bfloat16", "--modes")
    shapes = ("--shapes", *MAIN_SHAPES, *sixteen_bit_first)
    large = in_folder("gpu", "ops", "attention")
    lacks_memory = f"needs {LARGE_GIB} GiB of GPU memory" * (facts["memory_gib"] < LARGE_GIB)
    return [
        benchmark_step("rates", 2, "rates", output),
        benchmark_step("bench-operators", 10, "op", output, *quick, *shapes),
        benchmark_step("counters", 4, "counters", output, *ncu, missing=missing),
        benchmark_step(
            "bench-models", 8, "model", output, *models, *sixteen_bit_first, "--modes", "eager"
        ),
        benchmark_step("bench-graph", 3, "model", output, *one_dtype, "graph"),
        benchmark_step("bench-compiled", 8, "model", output, *one_dtype, "compiled"),
        benchmark_step(
            "bench-contiguous", 2, "model", output, *one_dtype, "eager",
            "--memory-format", "contiguous",
        ),
        tune_step("tune", 4, output, work),
        pytest_step(output, "large", 3, *large, "-k", LARGE, group="", missing=lacks_memory),
        benchmark_step("bench-more", 1, "op", output, *quick),
    ]  # fmt: skip


def cpu_runs(output: Path) -> list[Step]:
    """Return the shortest forms of the remaining steps; the emulator counts instructions."""
    missing = "" if shutil.which("nvcc") and shutil.which("g++") else "needs nvcc and g++"
    count = [sys.executable, "-m", "tests.sass", "forward", "fp16", "D16"]
    quick = ("--device", "cpu", "--threads", "1", "--min-time")
    operators = ("--shapes", "1x7x7x32", "--dtypes", "float32")
    models = ("--models", "flash_internimage_nano", "--batch-size", "1")
    return [
        Step("small-run", [sys.executable, "-m", "tests.gpu.sanitize", "--device", "cpu"], 4),
        benchmark_step("rates", 2, "rates", output, *quick, "1e-4"),
        benchmark_step("bench-operators", 10, "op", output, *quick, "1e-4", *operators),
        Step("counters", count, 4, missing=missing),
        benchmark_step("bench-models", 8, "model", output, *quick, "1e-3", *models),
        tune_step("tune", 4, output, output, *quick, "1e-4", "--variants"),
    ]


# The program


def fail(message: str) -> NoReturn:
    """End the program because of wrong arguments or missing packages."""
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(2)


def time_limit(text: str) -> float:
    """Parse the time limit."""
    with contextlib.suppress(ValueError):
        if LEAST_SECONDS <= (seconds := float(text)) < math.inf:
            return seconds
    message = f"must be a number of seconds of at least {LEAST_SECONDS:g}, got {text!r}"
    raise argparse.ArgumentTypeError(message)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_check", description=__doc__.splitlines()[0]
    )
    option = parser.add_argument
    default = "default: %(default)s"
    option("--seconds", type=time_limit, default=480, metavar="T", help=f"time limit, {default}")
    text = f"folder of the report and the logs, {default}"
    option("--output", type=Path, default=Path("output/gpu-check"), metavar="DIR", help=text)
    option("--steps", nargs="+", metavar="STEP", help="run these steps only")
    text = "keep the build in this folder, and use the one that is there; default: a temporary one"
    option("--build-dir", type=Path, metavar="DIR", help=text)
    return parser.parse_args(argv)


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
        steps = make_steps(facts, output, work)
        names = [step.name for step in steps]
        if unknown := [name for name in args.steps or () if name not in names]:
            fail(f"--steps must be among {', '.join(names)} here, got {unknown[0]!r}")
        steps = [step for step in steps if step.name in (args.steps or names)]
        check = Check(steps, facts, output, work, args.seconds, start)
        versions = [f"{name} {value}" for name, value in facts.items() if isinstance(value, str)]
        say(
            ", ".join(
                versions if facts["gpu"] else ["no GPU: the CUDA emulator and the CPU", *versions]
            )
        )
        passed = check.run()
    shutil.make_archive(str(output), "gztar", output)
    files = f"report: {args.output / 'report.json'}, all files: {args.output}.tar.gz"
    say(f"\n{files}\n\n{check.table()}")
    raise SystemExit(0 if passed else 1)


if __name__ == "__main__":
    main()
