"""Test and benchmark the operators and models on the GPU of this machine, within a time limit.

python -m tools.gpu_check --seconds 800 --output output/gpu-check

Works without a network and installs nothing: it needs Python >= 3.11 with torch, pytest, hypothesis
and numpy, and leaves out the steps for which other packages or programs are missing. The operators
are compiled into a temporary folder. Without a GPU, the same steps run on the CUDA emulator and the
CPU. The exit status is 0 if every step that ran passed, and 1 if one failed or was stopped.
"""

import argparse
import contextlib
import dataclasses
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
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
REQUIRED = ("torch", "numpy", "pytest", "hypothesis")
MODELS = ("timm", "torchvision", "huggingface_hub", "safetensors", "yaml", "tqdm", "filelock")
BENCHMARKS = (*MODELS, "matplotlib")
OPTIONAL = ("setuptools", "ninja", "triton", "expecttest", *BENCHMARKS, "DCNv4", "mmcv")

GRACE = 5.0  # seconds between SIGINT, after which programs save what they have, and SIGKILL
LEAST = 15.0  # a step is not started with fewer seconds left
PROBE_SECONDS = 120.0
LOG_LINES = 15  # shown of the log of a failed step

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
# A benchmark whose own operator or model fails is a failed step.
OURS = ("ops_dcnv4", "ms_deform_attn", "flash_deform_attn", "flash_internimage")


@dataclasses.dataclass
class Step:
    """A step of the check: a program to run and, afterwards, its result.

    Attributes:
        name: Name in the report, of the log, and for `--steps` and `--skip`.
        command: The program.
        share: Relative part of the time that the step can use even if all others before it hang.
        kind: "build", "tests", "benchmark" or "run": how the result is read.
        needs: Modules that must be importable.
        missing: Why the step cannot run here, if it is known beforehand.
        compiled: Whether the step needs the operators that the step "build" compiles.
        env: Additional environment variables.
        folder: Folder of the files that the program writes.
        result: "passed", "failed", "stopped" (out of time), "left out" or "not reached".
        seconds: Duration.
        note: Short explanation.
        details: Counts, failures and slowest tests, or the files that were written.
    """

    name: str
    command: list[str]
    share: float
    kind: str = "run"
    needs: Sequence[str] = ()
    missing: str = ""
    compiled: bool = True
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    folder: Path | None = None
    result: str = "not reached"
    seconds: float = 0.0
    note: str = ""
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Return what the report contains."""
        names = ("name", "result", "seconds", "note", "command", "details")
        return {name: getattr(self, name) for name in names}


def say(text: str = "") -> None:
    """Write a line."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


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
    command = [sys.executable, "setup.py", "build", "--build-base", str(work / "build")]
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


# Running steps


class Check:
    """Runs steps within a time limit, and keeps the report up to date.

    Args:
        steps: The steps by priority.
        facts: The facts about the machine.
        output: Folder of the report and the logs.
        work: Folder for temporary files, and of the compiled operators.
        seconds: Time limit.
        grace: Seconds between SIGINT and SIGKILL at the end of a step's time.
        least: Seconds that must be left to start a step.
        start: Time at which the time limit begins, as returned by `time.monotonic`.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        facts: dict[str, Any],
        output: Path,
        work: Path,
        seconds: float,
        grace: float,
        least: float,
        start: float | None = None,
    ) -> None:
        self.steps, self.facts, self.output, self.work = steps, facts, output, work
        self.seconds, self.grace, self.least = seconds, grace, least
        self.start = time.monotonic() if start is None else start
        self.end = self.start + seconds - grace - 2  # two seconds to kill a step and to report
        self.date = datetime.now(UTC).isoformat(timespec="seconds")

    def run(self) -> bool:
        """Run the steps; return whether at least one ran, and all that ran passed."""
        for step in self.steps:
            step.missing = step.missing or self._missing_build(step)
            if step.missing:
                step.result, step.note = "left out", step.missing
        self.write_report()
        for step, deadline in self._deadlines():
            if step.compiled and (missing := self._missing_build(step)):
                step.result, step.note = "left out", missing
            elif deadline is None:
                step.note = "no time left"
            else:
                self._run_step(step, deadline)
            self.write_report()
        ran = [step.result for step in self.steps if step.result not in ("left out", "not reached")]
        return bool(ran) and set(ran) == {"passed"}

    def _missing_build(self, step: Step) -> str:
        """Return why the compiled operators are missing, if the step needs them."""
        build = next((other for other in self.steps if other.kind == "build"), None)
        finished = build and build.result in ("failed", "stopped", "left out")
        return f"the build {build.result}" if step.compiled and build and finished else ""

    def _deadlines(self) -> Iterator[tuple[Step, float | None]]:
        """Yield the steps that can run, each with the time when it must end or None if too late.

        Time that a step does not use passes to the steps after it.
        """
        able = [step for step in self.steps if step.result != "left out"]
        total, shares = sum(step.share for step in able), 0.0
        for step in able:
            shares += step.share
            now = time.monotonic()
            deadline = self.start + (self.end - self.start) * shares / total
            late = now + self.least > self.end
            yield step, None if late else min(max(deadline, now + self.least), self.end)

    def _run_step(self, step: Step, deadline: float) -> None:
        """Run a step until it ends or its time is up, and read its result."""
        step.result, began = "running", time.monotonic()
        self.write_report()
        if step.kind == "benchmark":
            for file in benchmark_files(step):  # of an earlier check
                file.unlink()
        log = self.output / f"{step.name}.log"
        cwd = ROOT / "ops_dcnv4" if step.kind == "build" else ROOT
        try:
            with log.open("w") as output:
                output.write(f"{' '.join(step.command)}\n\n")
                output.flush()
                env = self._env(step)
                status = run_until(deadline, step.command, output, cwd, env, self.grace)
        except BaseException:
            step.result, step.note = "stopped", "interrupted"
            self.write_report()
            raise
        step.seconds = round(time.monotonic() - began, 1)
        step.result = "stopped" if status is None else "failed" if status else "passed"
        READERS[step.kind](step, self)
        lines = log.read_text(errors="replace").strip().splitlines()[2:]
        if step.result == "failed":
            step.note = step.note or (lines or [f"exit status {status}"])[-1].strip("= ")
        say(f"{step.name}: {step.result} in {step.seconds:.0f} s{step.note and ': '}{step.note}")
        if step.result == "failed":
            say("\n".join(f"    {line}" for line in lines[-LOG_LINES:]))

    def _env(self, step: Step) -> dict[str, str]:
        """Return the environment of a step: the compiled operators come first in the path."""
        hidden = ("FORCE_CPU", "OPS_DCNV4_BACKEND", "OPS_DCNV4_SANITIZE", "PYTEST_ADDOPTS")
        env = {name: value for name, value in os.environ.items() if name not in hidden}
        path = [str(self.work / "lib"), str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
        env |= {
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONUNBUFFERED": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "HYPOTHESIS_STORAGE_DIRECTORY": str(self.work / "hypothesis"),
        }
        return {"OMP_NUM_THREADS": "1"} | env | step.env

    def write_report(self) -> None:
        """Write report.json, so that it is complete at any time."""
        report = {
            "date": self.date,
            "seconds": round(time.monotonic() - self.start, 1),
            "limit": self.seconds,
            "machine": self.facts,
            "steps": [step.record() for step in self.steps],
        }
        text = json.dumps(report, indent=1)
        # Reports are meant to be shared, so they do not contain the paths of this machine.
        names = {self.work: "WORK", self.output: "OUTPUT", sys.executable: "python", ROOT: "."}
        for path, name in names.items():
            text = text.replace(json.dumps(str(path))[1:-1], name)
        partial = self.output / ".report.json.partial"
        partial.write_text(text + "\n")
        partial.replace(self.output / "report.json")

    def table(self) -> str:
        """Return the table of the results."""
        rows = [("step", "result", "seconds", "note")]
        rows += [(s.name, s.result, f"{s.seconds:.1f}", s.note[:90]) for s in self.steps]
        return "\n".join(f"{a:16}{b:12}{c:>8}  {d}".rstrip() for a, b, c, d in rows)


def run_until(
    deadline: float,
    command: Sequence[str],
    log: Any,
    cwd: Path = ROOT,
    env: dict[str, str] | None = None,
    grace: float = 5.0,
) -> int | None:
    """Run a program, and end it and all its child processes when the time is up.

    Args:
        deadline: Time when the program must end, as returned by `time.monotonic`.
        command: The program.
        log: Open file for its output.
        cwd: Working directory.
        env: Environment variables.
        grace: Seconds between SIGINT and SIGKILL.

    Returns:
        The exit status, or None if the time was up.
    """
    try:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        log.write(f"{error}\n")
        return 127
    try:
        return process.wait(deadline - time.monotonic())
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver can delay the end
            process.wait(1)


# Reading results


def read_build(step: Step, check: Check) -> None:
    """Fail if there is no library for the GPU, for want of a matching nvcc for example."""
    wanted = ["_C", "_C_cuda"] if check.facts["gpu"] else ["_C"]
    folder = (step.folder or check.work) / "ops_dcnv4"
    absent = [name for name in wanted if not list(folder.glob(f"{name}.*"))]
    if step.result == "passed":
        step.note = f"for {step.env.get('TORCH_CUDA_ARCH_LIST', 'the CPU')}"
        if absent:
            step.result, step.note = "failed", f"no {', '.join(absent)} was built: see build.log"


def read_tests(step: Step, check: Check) -> None:
    """Count the tests, and list those that failed, were skipped or took longest."""
    file = check.work / f"{step.name}.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    outcomes = [json.loads(line) for line in lines if line.endswith("\n")]
    counts = Counter(outcome["outcome"] for outcome in outcomes)
    failed = {o["test"]: o["message"] for o in outcomes if o["outcome"] == "failed"}
    slowest = sorted(outcomes, key=lambda outcome: -outcome["seconds"])[:5]
    step.details = {
        "counts": counts,
        "failed": failed,
        "skipped": {o["test"]: o["message"] for o in outcomes if o["outcome"] == "skipped"},
        "slowest": {outcome["test"]: outcome["seconds"] for outcome in slowest},
    }
    step.note = ", ".join(f"{counts[kind]} {kind}" for kind in sorted(counts))
    if failed:
        step.result = "failed"
        step.note += f": {next(iter(failed)).rpartition('/')[2]}"
    elif step.result == "passed" and not counts["passed"]:
        step.result, step.note = "failed", f"no test passed ({step.note or 'none was found'})"


def benchmark_files(step: Step) -> list[Path]:
    """Return the JSON files of a benchmark."""
    assert step.folder
    return sorted(step.folder.glob(f"{step.command[2].removeprefix('benchmarks.')}_*.json"))


def read_benchmark(step: Step, check: Check) -> None:
    """Count the results in the file, and list the implementations that were skipped or failed."""
    files = benchmark_files(step)
    results = []
    for file in files:
        with contextlib.suppress(json.JSONDecodeError):  # killed while it was written
            results += json.loads(file.read_text())["results"]
    names: dict[str, dict[str, None]] = {}
    for result in results:
        name = result.get("competitor") or result["model"]
        names.setdefault(result["status"], {})[name] = None
    others = {status: list(named) for status, named in names.items() if status != "ok"}
    step.details = {"files": [str(file.relative_to(check.output)) for file in files]} | others
    notes = [f"{sum('seconds' in result for result in results)} measured"]
    step.note = "; ".join(notes + [f"{status}: {', '.join(n)}" for status, n in others.items()])
    bad = [*others.get("failed", []), *others.get("wrong", [])]
    if not results and step.result == "failed":
        step.note = ""  # the last line of the log says more
    elif any(name.startswith(OURS) for name in bad):
        step.result = "failed"


READERS = {
    "build": read_build,
    "tests": read_tests,
    "benchmark": read_benchmark,
    "run": lambda step, check: None,
}


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
