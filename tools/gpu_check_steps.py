"""Programs that run one after another within a time limit, and the report of their results."""

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tools import gpu_check_figures

ROOT = Path(__file__).parents[1]
RESULTS = "results.jsonl"
UNAVAILABLE = 77  # exit status of a program that cannot run on this machine
# A benchmark whose own operator or model fails is a failed step.
OURS = ("ops_dcnv4", "ms_deform_attn", "flash_deform_attn", "flash_internimage")


@dataclasses.dataclass
class Step:
    """A step of the check: a program to run and, afterwards, its result.

    Attributes:
        name: Name in the report, of the log, and for `--steps`.
        command: The program.
        share: Relative part of the time that the step can use even if all others before it hang.
            Steps that run at the same time can use the sum of their shares.
        read: Function that reads the files of the step when it has ended, and adds to its result.
        needs: Modules that must be importable.
        missing: Why the step cannot run here, if it is known beforehand.
        compiled: Whether the step needs the operators that the step "build" compiles.
        group: Name of the group of consecutive steps that run at the same time, if any.
        env: Additional environment variables.
        folder: Folder of the files that the program writes.
        result: "passed", "failed", "stopped" (out of time), "left out" or "not reached".
        seconds: Duration.
        note: Short explanation.
        details: Counts, failures and skipped tests, or the files that were written.
        figures: Figures of the step (see tools.gpu_check_figures).
    """

    name: str
    command: list[str]
    share: float
    read: "Callable[[Step, Check], None] | None" = None
    needs: Sequence[str] = ()
    missing: str = ""
    compiled: bool = True
    group: str = ""
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    folder: Path | None = None
    result: str = "not reached"
    seconds: float = 0.0
    note: str = ""
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    figures: list[gpu_check_figures.Figure] = dataclasses.field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """Return what the report contains."""
        names = ("name", "result", "seconds", "note", "command", "details", "figures")
        return {name: getattr(self, name) for name in names}


def say(text: str = "") -> None:
    """Write a line."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


# Running steps


class Check:
    """Runs steps within a time limit, and keeps the report up to date.

    Args:
        steps: The steps by priority.
        facts: The facts about the machine.
        output: Folder of the report and the logs.
        work: Folder for temporary files, and of the compiled operators.
        seconds: Time limit.
        start: Time at which the time limit begins, as returned by `time.monotonic`.
    """

    grace = 5.0  # seconds between SIGINT, after which programs save what they have, and SIGKILL
    least = 15.0  # a step is not started with fewer seconds left

    def __init__(
        self,
        steps: Sequence[Step],
        facts: dict[str, Any],
        output: Path,
        work: Path,
        seconds: float,
        start: float | None = None,
    ) -> None:
        self.steps, self.facts, self.output, self.work = steps, facts, output, work
        self.seconds, self.start = seconds, time.monotonic() if start is None else start
        self.end = self.start + seconds - self.grace - 2  # two seconds to kill a step and to report
        self.date = datetime.now(UTC).isoformat(timespec="seconds")

    def run(self) -> bool:
        """Run the steps; return whether at least one ran and all is well.

        Benchmarks whose time is up have partial results; other steps must pass.
        """
        (self.output / RESULTS).unlink(missing_ok=True)  # of an earlier check
        for step in self.steps:
            step.missing = step.missing or self._missing_build(step)
            if step.missing:
                self._leave_out(step, step.missing)
        self.write_report()
        for steps, deadline in self._deadlines():
            able = []
            for step in steps:
                if step.compiled and (missing := self._missing_build(step)):
                    self._leave_out(step, missing)
                elif deadline is None:
                    step.note = "no time left"
                    self._write_results(step)
                else:
                    able.append(step)
            if deadline is not None:
                self._run_steps(able, deadline)
            self.write_report()
        ran = [step for step in self.steps if step.result not in ("left out", "not reached")]
        return bool(ran) and all(
            step.result == "passed" or (step.result == "stopped" and step.read is read_benchmark)
            for step in ran
        )

    def _leave_out(self, step: Step, reason: str) -> None:
        step.result, step.note = "left out", reason
        self._write_results(step)

    def _missing_build(self, step: Step) -> str:
        """Return why the compiled operators are missing, if the step needs them."""
        build = next((other for other in self.steps if other.name == "build"), None)
        bad = step.compiled and build and build.result in ("failed", "stopped", "left out")
        return f"the build {build.result}" if build and bad else ""

    def _deadlines(self) -> Iterator[tuple[list[Step], float | None]]:
        """Yield the steps that run together, with the time when they must end or None if too late.

        Time that steps do not use passes to the steps after them.
        """
        able = [step for step in self.steps if step.result != "left out"]
        total, shares = sum(step.share for step in able), 0.0
        for _, group in itertools.groupby(able, key=lambda step: step.group or step.name):
            steps = list(group)
            shares += sum(step.share for step in steps)
            now = time.monotonic()
            deadline = self.start + (self.end - self.start) * shares / total
            late = now + self.least > self.end
            yield steps, None if late else min(max(deadline, now + self.least), self.end)

    def _run_steps(self, steps: Sequence[Step], deadline: float) -> None:
        """Run steps at the same time until they end or their time is up, and read their results."""
        processes: dict[str, subprocess.Popen] = {}
        by_name = {step.name: step for step in steps}
        began = time.monotonic()
        try:
            for step in steps:
                step.result = "running"
                if process := self._start(step):
                    processes[step.name] = process
                else:
                    self._finish(step, 127, began)
            self.write_report()
            for name in completed(processes, deadline):
                self._finish(by_name[name], processes[name].returncode, began)
                self.write_report()
            late = [name for name in processes if by_name[name].result == "running"]
            interrupt([processes[name] for name in late], self.grace)
            for name in late:
                self._finish(by_name[name], None, began)
        except BaseException:
            for step in steps:
                if step.result == "running":
                    step.result, step.note = "stopped", "interrupted"
            self.write_report()
            raise
        finally:
            for process in processes.values():
                kill_session(process.pid)
                with contextlib.suppress(subprocess.TimeoutExpired):  # a driver can delay the end
                    process.wait(1)

    def _start(self, step: Step) -> subprocess.Popen | None:
        """Start the program of a step; return None if there is no such program."""
        for file in (self.outcomes(step), *benchmark_files(step)):
            file.unlink(missing_ok=True)  # of an earlier check
        with self.log(step).open("w") as log:
            log.write(f"{' '.join(step.command)}\n\n")
            log.flush()
            try:
                return subprocess.Popen(
                    step.command,
                    cwd=ROOT / "ops_dcnv4" if step.name == "build" else ROOT,
                    env=self._env(step),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                log.write(f"{error}\n")
        return None

    def _finish(self, step: Step, status: int | None, began: float) -> None:
        """Read the result of a step from its exit status, or None if its time was up."""
        step.seconds = round(time.monotonic() - began, 1)
        results = {None: "stopped", 0: "passed", UNAVAILABLE: "left out"}
        step.result = results.get(status, "failed")
        try:
            if step.read:
                step.read(step, self)
        except Exception as error:  # the other steps must still run
            step.result, step.note = "failed", f"results cannot be read: {error!r}"
        if step.result in ("failed", "left out") and not step.note:
            lines = self.log(step).read_text(errors="replace").strip().splitlines()[2:]
            step.note = (lines or [f"exit status {status}"])[-1].strip("= ")
        self._write_results(step)
        say(f"{step.name}: {step.result} in {step.seconds:.0f} s{step.note and ': '}{step.note}")

    def log(self, step: Step) -> Path:
        """Return the log of a step."""
        return self.output / f"{step.name}.log"

    def outcomes(self, step: Step) -> Path:
        """Return the file with the outcomes of a step's tests."""
        return self.output / f"{step.name}.jsonl"

    def _write_results(self, step: Step) -> None:
        """Append a line for the step and one for each of its figures to results.jsonl."""
        line = {"step": step.name, "result": step.result, "seconds": step.seconds}
        lines = [line | {"note": step.note}, *({"step": step.name, **f} for f in step.figures)]
        with (self.output / RESULTS).open("a") as file:
            file.writelines(self._without_paths(json.dumps(line)) + "\n" for line in lines)

    def _env(self, step: Step) -> dict[str, str]:
        """Return the environment of a step: the compiled operators come first in the path."""
        hidden = ["FORCE_CPU", "PYTEST_ADDOPTS"]
        hidden += [f"OPS_DCNV4_{name}" for name in ("BACKEND", "SANITIZE", "SKIP_CPU")]
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
        partial = self.output / ".report.json.partial"
        partial.write_text(self._without_paths(json.dumps(report, indent=1)) + "\n")
        partial.replace(self.output / "report.json")

    def _without_paths(self, text: str) -> str:
        """Remove the paths of this machine from JSON, as reports are meant to be shared."""
        names = {self.work: "WORK", self.output: "OUTPUT", sys.executable: "python", ROOT: "."}
        for path, name in names.items():
            text = text.replace(json.dumps(str(path))[1:-1], name)
        return text

    def table(self) -> str:
        """Return the tables of the figures and of the steps.

        The most important steps come last, as only the end of a long output may be kept.
        """
        lines = []
        for step in reversed(self.steps):
            if step.figures:
                lines += [step.name, *gpu_check_figures.table(step.figures), ""]
        rows = [("step", "result", "seconds", "note")]
        rows += [(s.name, s.result, f"{s.seconds:.1f}", s.note[:90]) for s in self.steps]
        lines += [f"{a:20}{b:12}{c:>8}  {d}".rstrip() for a, b, c, d in rows]
        counts = Counter(step.result for step in self.steps)
        return "\n".join([*lines, ", ".join(f"{n} {result}" for result, n in counts.items())])


def completed(processes: dict[str, subprocess.Popen], deadline: float) -> Iterator[str]:
    """Yield the names of processes as they end, until none runs or the time is up.

    Args:
        processes: The processes by name.
        deadline: Time when waiting ends, as returned by `time.monotonic`.
    """
    running = dict(processes)
    while running:
        ended = [name for name, process in running.items() if process.poll() is not None]
        for name in ended:
            del running[name]
            yield name
        if time.monotonic() >= deadline:
            return
        time.sleep(0.02)


def interrupt(processes: Sequence[subprocess.Popen], grace: float) -> None:
    """Send SIGINT to processes, and wait up to `grace` seconds until they have ended."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
    deadline = time.monotonic() + grace
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(deadline - time.monotonic(), 0))


def kill_session(leader: int) -> None:
    """Kill all processes of a session, as ninja runs each compiler in a process group of its own.

    Without /proc, only the process group of the leader is killed.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
    for _ in range(3):  # processes may start others in the meantime
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # has ended, or belongs to someone else
                if os.getsid(int(entry.name)) == leader:
                    os.kill(int(entry.name), signal.SIGKILL)


# Reading results


def read_build(step: Step, check: Check) -> None:
    """Fail if no GPU library was built, for example because nvcc does not match."""
    wanted = ["_C", "_C_cuda"] if check.facts["gpu"] else ["_C"]
    folder = (step.folder or check.work) / "ops_dcnv4"
    absent = [name for name in wanted if not list(folder.glob(f"{name}.*"))]
    if step.result == "passed":
        step.note = f"for {step.env.get('TORCH_CUDA_ARCH_LIST', 'the CPU')}"
        if absent:
            step.result, step.note = "failed", f"no {', '.join(absent)} was built: see build.log"


def read_tests(step: Step, check: Check) -> None:
    """Count the tests, and list those that failed or were skipped."""
    file = check.outcomes(step)
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    outcomes = [json.loads(line) for line in lines if line.endswith("\n")]
    counts = Counter(outcome["outcome"] for outcome in outcomes)
    failed = {o["test"]: o["message"] for o in outcomes if o["outcome"] == "failed"}
    step.details = {
        "counts": counts,
        "failed": failed,
        "skipped": {o["test"]: o["message"] for o in outcomes if o["outcome"] == "skipped"},
    }
    step.note = ", ".join(f"{counts[kind]} {kind}" for kind in sorted(counts))
    if failed:
        step.result = "failed"
        step.note += f": {next(iter(failed)).rpartition('/')[2]}"
    elif step.result == "passed" and not counts["passed"]:
        step.result, step.note = "failed", f"no test passed ({step.note or 'none was found'})"


def read_sanitizer(step: Step, check: Check) -> None:
    """Leave out a checker that does not support the GPU, such as a virtual one."""
    if step.result == "failed" and "Device not supported" in check.log(step).read_text():
        step.result, step.note = "left out", "compute-sanitizer does not support this GPU"


def benchmark_files(step: Step) -> list[Path]:
    """Return the JSON files of a benchmark; other steps have none."""
    return sorted(step.folder.glob("*.json")) if step.folder and step.read is read_benchmark else []


def read_benchmark(step: Step, check: Check) -> None:
    """Read the figures, and list the implementations that were skipped or failed."""
    files, results = benchmark_files(step), []
    for file in files:
        with contextlib.suppress(json.JSONDecodeError):  # killed while it was written
            record = json.loads(file.read_text())
            results += record["results"]
            step.figures += gpu_check_figures.figures(record)
    others: dict[str, list[str]] = {}
    for result in results:
        name, status = result.get("competitor") or result.get("model"), result.get("status", "ok")
        if status != "ok" and name not in others.setdefault(status, []):
            others[status].append(name)
    step.details = {"files": [str(file.relative_to(check.output)) for file in files]} | others
    notes = [f"{sum('seconds' in r or 'measured' in r for r in results)} measured"]
    step.note = "; ".join(notes + [f"{status}: {', '.join(n)}" for status, n in others.items()])
    bad = [*others.get("failed", []), *others.get("wrong", [])]
    if not results and step.result in ("failed", "left out"):
        step.note = ""  # the last line of the log says more
    elif any(name.startswith(OURS) for name in bad):
        step.result = "failed"
