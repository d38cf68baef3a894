"""Tests of the check for GPU machines: its time limit, its report, and short runs on the CPU."""

import dataclasses
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.cuda_model.build import AVAILABLE
from tools import gpu_check, gpu_check_figures, gpu_check_steps
from tools.gpu_check import SANITIZERS, make_steps
from tools.gpu_check_steps import (
    ROOT,
    Check,
    Step,
    completed,
    read_benchmark,
    read_build,
    read_sanitizer,
)

MODULES = [*gpu_check.REQUIRED, *gpu_check.OPTIONAL]
CPU = {"gpu": None, "modules": MODULES, "commit": None, "compute_sanitizer": None, "ncu": None}
CPU |= {"python": "3.12", "torch": "2.11", "cuda": "13.0"}
GPU = CPU | {"gpu": "Test GPU", "compute_capability": "9.0", "driver": "1.0", "memory_gib": 140}
GPU |= {"compute_sanitizer": "/cuda/bin/compute-sanitizer", "ncu": "/cuda/bin/ncu"}

# Programs that write a file when they can be interrupted, and then do not end by themselves.
HANGS = """
import pathlib, sys, time
try:
    pathlib.Path(sys.argv[1], "ready").touch()
    time.sleep(600)
except KeyboardInterrupt:
    print("last words")
"""
IGNORES_SIGINT = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = os.fork()
if child:
    os.setpgid(child, child)  # as ninja does with compilers
    pathlib.Path(sys.argv[1], "pids").write_text(f"{os.getpid()} {child}")
    pathlib.Path(sys.argv[1], "ready").touch()
time.sleep(600)
"""


def program(name: str, code: str, *arguments: object, **options) -> Step:
    """Return a step that runs Python code."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return Step(name, command, **{"share": 1, "compiled": False} | options)


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    output, work = tmp_path / "output", tmp_path / "work"
    output.mkdir()
    work.mkdir()
    return output, work


@pytest.fixture
def run(folders):
    """Return a function that runs steps, and returns the check, its verdict and its report."""

    def run(steps, facts=CPU, seconds=1e6, **options):
        check = Check(steps, facts, *folders, seconds)
        vars(check).update({"grace": 60, "least": 0} | options)
        verdict = check.run()
        return check, verdict, json.loads((folders[0] / "report.json").read_text())

    return run


def results(check: Check) -> dict[str, str]:
    return {step.name: step.result for step in check.steps}


# Time limit


@pytest.fixture
def schedule(monkeypatch, folders):
    """Return a function that runs steps of given durations on a clock of its own."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(gpu_check_steps, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def run(*steps, end):
        ran = {}

        def run_steps(self, together, deadline):
            for step in together:
                ran[step.name] = deadline - 1000, clock.now - 1000
                step.result = "passed"
            longest = max(durations[step.name] for step in together)
            clock.now = min(clock.now + longest, deadline)

        monkeypatch.setattr(Check, "_run_steps", run_steps)
        durations = {name: duration for name, duration, *_ in steps}
        planned = [
            Step(name, [], share, compiled=False, group="".join(group))
            for name, _, share, *group in steps
        ]
        check = Check(planned, CPU, *folders, seconds=end + 7)
        check.run()
        return ran, results(check)

    return run


def test_a_step_that_hangs_does_not_use_the_shares_of_the_others(schedule):
    ran, _ = schedule(("a", 9999, 1), ("b", 10, 1), ("c", 9999, 2), end=400)
    assert ran == {"a": (100, 0), "b": (200, 100), "c": (400, 110)}


def test_unused_time_passes_to_the_next_steps(schedule):
    ran, _ = schedule(("a", 1, 3), ("b", 9999, 1), end=400)
    assert ran == {"a": (300, 0), "b": (400, 1)}


def test_steps_of_a_group_have_the_sum_of_their_shares(schedule):
    ran, _ = schedule(
        ("a", 1, 1), ("b", 50, 1, "group"), ("c", 9999, 1, "group"), ("d", 1, 1), end=400
    )
    assert ran == {"a": (100, 0), "b": (300, 1), "c": (300, 1), "d": (400, 300)}


def test_steps_for_which_there_is_no_time_are_not_reached(schedule):
    ran, outcomes = schedule(("a", 9999, 1), ("b", 9999, 1), ("c", 1, 1), ("d", 1, 1), end=32)
    assert ran == {"a": (15, 0), "b": (30, 15)}  # each gets at least 15 seconds
    assert outcomes == {"a": "passed", "b": "passed", "c": "not reached", "d": "not reached"}


@pytest.fixture
def time_is_up(monkeypatch, folders):
    """Let the time of steps be up as soon as a program has written the file "ready"."""
    waiting = SimpleNamespace(error=None, deadlines=[])

    def completed_before_ready(processes, deadline):
        waiting.deadlines.append(deadline)
        running = dict(processes)
        while running:
            for name in [name for name, process in running.items() if process.poll() is not None]:
                del running[name]
                yield name
            if (folders[1] / "ready").exists():
                (folders[1] / "ready").unlink()
                if waiting.error:
                    raise waiting.error
                return
            time.sleep(0.01)

    monkeypatch.setattr(gpu_check_steps, "completed", completed_before_ready)
    return waiting


def assert_killed(folder: Path) -> None:
    """Assert that the processes in the file "pids" have ended; a zombie has."""
    for pid in (folder / "pids").read_text().split():
        for _ in range(6000):
            state = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True)
            if state.stdout.strip()[:1] in ("", "Z"):
                break
            time.sleep(0.01)
        else:
            raise AssertionError(f"process {pid} is running")


def test_waiting_ends_at_the_deadline():
    processes = {
        name: subprocess.Popen([sys.executable, "-c", code])
        for name, code in (("quick", ""), ("slow", "import time; time.sleep(600)"))
    }
    try:
        processes["quick"].wait()
        assert list(completed(processes, time.monotonic())) == ["quick"]
        processes["slow"].kill()
        assert list(completed(processes, time.monotonic() + 1e6)) == ["quick", "slow"]
    finally:
        processes["slow"].kill()
        processes["slow"].wait()


def test_steps_of_a_group_run_at_the_same_time(run, folders):
    """Each of two programs waits for the file of the other."""
    code = """
import pathlib, sys, time
mine, other = map(pathlib.Path, sys.argv[1:])
mine.touch()
while not other.exists():
    time.sleep(0.01)
"""
    a, b = folders[1] / "a", folders[1] / "b"
    steps = [program("a", code, a, b, group="both"), program("b", code, b, a, group="both")]
    check, passed, _ = run([*steps, program("c", "raise SystemExit(1)", group="both")])
    assert results(check) == {"a": "passed", "b": "passed", "c": "failed"}
    assert not passed


def test_a_step_is_interrupted_when_its_time_is_up(run, folders, time_is_up):
    _, passed, report = run([program("slow", HANGS, folders[1]), program("next", "")])
    assert 4e5 < time_is_up.deadlines[0] - time.monotonic() < 5e5  # half of the time
    assert [step["result"] for step in report["steps"]] == ["stopped", "passed"]
    assert not passed
    assert (folders[0] / "slow.log").read_text().splitlines()[-1] == "last words"


def test_a_step_that_ignores_the_interruption_is_killed_with_its_children(run, folders, time_is_up):
    check, *_ = run([program("slow", IGNORES_SIGINT, folders[1]), program("next", "")], grace=0.1)
    assert results(check) == {"slow": "stopped", "next": "passed"}
    assert_killed(folders[1])


def test_an_interrupted_check_kills_its_step_and_keeps_its_report(run, folders, time_is_up):
    time_is_up.error = KeyboardInterrupt()
    steps = [program("first", ""), program("slow", IGNORES_SIGINT, folders[1]), program("last", "")]
    with pytest.raises(KeyboardInterrupt):
        run(steps)
    assert_killed(folders[1])
    report = json.loads((folders[0] / "report.json").read_text())
    outcomes = [(step["result"], step["note"]) for step in report["steps"]]
    assert outcomes == [("passed", ""), ("stopped", "interrupted"), ("not reached", "")]


# Results


def test_the_exit_status_and_the_log_decide(run):
    steps = [
        program("good", "print('fine')"),
        program("bad", "print('a'); print('the reason'); raise SystemExit(3)"),
        program("silent", "raise SystemExit(4)"),
        Step("absent", ["/no/such/program"], 1, compiled=False),
    ]
    check, passed, report = run(steps)
    assert not passed
    assert list(results(check).values()) == ["passed", "failed", "failed", "failed"]
    assert [step["note"] for step in report["steps"][:3]] == ["", "the reason", "exit status 4"]
    assert "No such file" in report["steps"][3]["note"]


def test_a_check_passes_if_a_step_ran_and_every_step_that_ran_passed(run):
    left_out = program("other", "", missing="needs a moon")
    assert run([program("good", ""), left_out])[1]
    assert not run([left_out])[1]


def test_the_report_is_complete_while_a_step_runs(run, folders):
    copy = folders[1] / "copy.json"
    code = "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[2])"
    report = folders[0] / "report.json"
    run([program("a", ""), program("b", code, report, copy), program("c", "")])
    outcomes = [step["result"] for step in json.loads(copy.read_text())["steps"]]
    assert outcomes == ["passed", "running", "not reached"]


def test_the_report_has_no_paths_of_the_machine(run, folders):
    *_, report = run([program("a", "raise OSError(__file__)", ROOT / "x", *folders)])
    assert report["steps"][0]["command"][0] == "python"
    assert report["steps"][0]["command"][3:] == ["./x", "OUTPUT", "WORK"]
    assert report["machine"]["torch"] == "2.11"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}\+00:00", report["date"])


@pytest.mark.parametrize(("facts", "passes"), [(GPU, False), (CPU, True)])
def test_a_build_without_the_library_of_the_gpu_fails(facts, passes, run, folders):
    lib = folders[1] / "lib"
    (lib / "ops_dcnv4").mkdir(parents=True)
    (lib / "ops_dcnv4" / "_C.abi3.so").touch()
    build = program("build", "", read=read_build, folder=lib)
    needs_it, triton = program("operators", "", compiled=True), program("triton", "")
    check, passed, _ = run([build, needs_it, triton], facts)
    assert passed == passes
    expected = ["passed", "passed"] if passes else ["failed", "left out"]
    assert list(results(check).values()) == [*expected, "passed"]
    if not passes:
        notes = ["no _C_cuda was built: see build.log", "the build failed"]
        assert [step.note for step in check.steps[:2]] == notes


def test_programs_that_cannot_run_here_are_left_out(run):
    unsupported = "print('Error: Device not supported'); raise SystemExit(1)"
    steps = [
        program("counters", "print('no permission'); raise SystemExit(77)"),
        program("memcheck", unsupported, read=read_sanitizer),
        program("racecheck", "print('1 hazard'); raise SystemExit(1)", read=read_sanitizer),
    ]
    check, *_ = run(steps)
    assert [(step.result, step.note) for step in check.steps] == [
        ("left out", "no permission"),
        ("left out", "compute-sanitizer does not support this GPU"),
        ("failed", "1 hazard"),
    ]
    assert run([program("good", ""), steps[0]])[1]


TESTS = """
import pathlib, time
import pytest

def test_good(): pass

def test_bad():
    assert 1 == 2, "one is not two"

@pytest.mark.skip("for a reason")
def test_skipped(): pass

@pytest.fixture
def broken():
    raise ValueError("not set up")

def test_error(broken): pass

def test_slow():
    pathlib.Path(__file__).with_name("ready").touch()
    time.sleep(600)
"""


@pytest.mark.slow
def test_the_outcomes_of_tests_are_listed_even_if_they_are_stopped(run, folders, time_is_up):
    work = folders[1]
    module = work / "test_it.py"
    module.write_text(TESTS)
    (work / "test_broken.py").write_text("import no_such_module")
    step = gpu_check.pytest_step(folders[0], "it", 1, str(work), "--continue-on-collection-errors")
    _, passed, report = run([step, program("next", "")])
    assert not passed
    details = report["steps"][0]["details"]
    assert details["counts"] == {"failed": 3, "passed": 1, "skipped": 1}
    # Names start at the common folder of the tests.
    failed = {name.rpartition("/")[2]: message for name, message in details["failed"].items()}
    assert failed == {
        "test_broken.py": "E   ModuleNotFoundError: No module named 'no_such_module'",
        "test_it.py::test_bad": "AssertionError: one is not two",
        "test_it.py::test_error": "ValueError: not set up",
    }
    assert list(details["skipped"].values()) == ["for a reason"]
    assert [step["result"] for step in report["steps"]] == ["failed", "passed"]
    assert report["steps"][0]["note"].startswith("3 failed, 1 passed, 1 skipped: test_broken.py")


@pytest.mark.slow
def test_tests_of_which_none_passes_fail(run, folders):
    (folders[1] / "test_it.py").write_text(TESTS)
    step = gpu_check.pytest_step(folders[0], "it", 1, str(folders[1]), "-k", "skipped")
    check, *_ = run([step])
    assert (check.steps[0].result, check.steps[0].note) == ("failed", "no test passed (1 skipped)")


@pytest.mark.parametrize(("ours", "result"), [("ok", "passed"), ("wrong", "failed")])
def test_a_benchmark_fails_if_an_operator_of_this_project_fails(ours, result, run, folders):
    step = gpu_check.benchmark_step("bench", 1, "op", folders[0])
    step.folder.mkdir()
    kind = {"shape": "1x7x7x32/16", "dtype": "float16", "pass": "forward"}
    listed = [
        {"competitor": "ops_dcnv4", "status": ours, "seconds": 2e-6, "predicted_seconds": 1e-6},
        {"competitor": "tuned grid_sample", "status": "ok", "seconds": 5e-6, "ratio": 2.5},
        {"competitor": "grid_sample", "status": "failed"},
        {"competitor": "published DCNv4", "status": "skipped"},
    ]
    record = {"benchmark": "op", "results": [kind | result for result in listed]}
    (step.folder / "op_machine.json").write_text(json.dumps(record))
    (step.folder / "op_other.json").write_text('{"results": [{"competitor"')  # was killed
    check, *_ = run([program("a", "")])
    step.result = "passed"
    read_benchmark(step, check)
    wrong = "" if ours == "ok" else "wrong: ops_dcnv4; "
    note = f"2 measured; {wrong}failed: grid_sample; skipped: published DCNv4"
    assert (step.result, step.note) == (result, note)
    assert step.details["files"] == ["bench/op_machine.json", "bench/op_other.json"]
    assert len(step.figures) == 1
    line = gpu_check_figures.table(step.figures)[1]
    columns = ["1x7x7x32/16", "float16", "forward", "2", "1", "2.00", "us"]
    assert line.split() == [*columns, "tuned", "grid_sample", "2.50x"]


def test_a_benchmark_whose_time_is_up_does_not_fail_the_check(run, folders, time_is_up):
    step = program("bench", HANGS, folders[1], read=read_benchmark, folder=folders[1] / "bench")
    check, passed, _ = run([step, program("next", "")])
    assert results(check) == {"bench": "stopped", "next": "passed"}
    assert passed


def test_results_that_cannot_be_read_fail_only_their_step(run):
    def read(step, check):
        raise KeyError("seconds")

    check, *_ = run([program("bad", "", read=read), program("next", "")])
    assert results(check) == {"bad": "failed", "next": "passed"}
    assert check.steps[0].note == "results cannot be read: KeyError('seconds')"


def test_results_are_written_as_lines(run, folders):
    def read(step, check):
        step.figures = [gpu_check_figures.figure("speed", 2.0, 1.0, "m/s")]

    steps = [program("other", "", missing="needs a moon"), program("bench", "", read=read)]
    for _ in range(2):  # the second check replaces the file of the first
        run([dataclasses.replace(step) for step in steps])
    lines = [json.loads(line) for line in (folders[0] / "results.jsonl").read_text().splitlines()]
    assert [line.get("result") for line in lines] == ["left out", "passed", None]
    assert lines[0]["note"] == "needs a moon"
    expected = {"step": "bench", "name": "speed", "measured": 2.0, "predicted": 1.0}
    assert lines[2] == expected | {"unit": "m/s", "note": ""}


def test_results_of_an_earlier_check_are_removed(run, folders):
    files = [folders[1] / "op_machine.json", folders[0] / "bench.jsonl"]
    for file in files:
        file.write_text('{"results": []}')
    run([program("bench", "", read=read_benchmark, folder=folders[1])])
    assert not any(file.exists() for file in files)


# Steps


def test_every_module_of_tests_gpu_belongs_to_a_step(tmp_path):
    commands = [step.command for step in make_steps(GPU, tmp_path, tmp_path)]
    run = {part.partition("::")[0] for command in commands for part in command}
    modules = {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/gpu/test_*.py")}
    assert modules
    assert modules == {part for part in run if part.startswith("tests/gpu/test_")}


def test_the_order_of_the_steps_on_a_gpu(tmp_path):
    steps = make_steps(GPU, tmp_path, tmp_path)
    assert not any(step.missing for step in steps)
    names = [step.name for step in steps]
    assert names[:5] == ["build", "dcnv4", "attention", "triton-dcnv4", "triton-attention"]
    assert names[9:13] == list(SANITIZERS)
    assert names[13:17] == ["rates", "bench-operators", "counters", "bench-models"]
    assert sum(step.share for step in steps) == 100
    assert 480 * steps[0].share / 100 < 120  # seconds for the build
    assert steps[0].env["TORCH_CUDA_ARCH_LIST"] == steps[8].env["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert "FORCE_CPU" not in steps[0].env
    groups = [step.group for step in steps if step.group]
    assert groups == ["tests"] * 8 + ["sanitizers"] * 4  # benchmarks run alone


def test_the_commands_of_benchmarks_are_accepted(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    benchmarks = [s for s in make_steps(GPU, tmp_path, tmp_path) if s.read is read_benchmark]
    assert len(benchmarks) == 10
    for step in benchmarks:
        module = importlib.import_module(step.command[2])
        assert module.parse_arguments(step.command[3:]).device == "cuda"


def test_without_a_gpu_the_emulator_and_the_cpu_are_used(tmp_path):
    steps = make_steps(CPU, tmp_path, tmp_path)
    assert steps[0].env["FORCE_CPU"] == "1"
    paths = {part for step in steps for part in step.command if part.startswith("tests/")}
    assert paths
    assert not [path for path in paths if path.startswith("tests/gpu")]
    assert all((ROOT / path.partition("::")[0]).exists() for path in paths)


def test_steps_without_their_packages_or_programs_are_left_out(tmp_path):
    modules = [name for name in MODULES if name not in ("timm", "triton")]
    facts = GPU | {"modules": modules, "compute_sanitizer": None, "ncu": None, "memory_gib": 40}
    missing = {s.name: s.missing for s in make_steps(facts, tmp_path, tmp_path) if s.missing}
    assert missing == {
        **dict.fromkeys(["triton-dcnv4", "triton-attention"], "needs triton"),
        **dict.fromkeys(SANITIZERS, "needs a GPU and compute-sanitizer"),
        **dict.fromkeys(["models", "bench-models", "bench-graph"], "needs timm"),
        **dict.fromkeys(["bench-compiled", "bench-contiguous"], "needs timm"),
        "counters": "needs ncu",
        "large": "needs 64 GiB of GPU memory",
    }


# The program


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "5"], "argument --seconds: must be a number of seconds of at least 30, got"),
        (["--seconds", "long"], "at least 30, got 'long'"),
        (["--steps", "build", "tset"], "--steps must be among build, dcnv4, .*, got 'tset'"),
        (["--output", __file__], f"cannot create the folder {__file__}: File exists"),
    ],
)
def test_wrong_arguments(arguments, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_check, "examine_machine", lambda seconds: CPU)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as error:
        gpu_check.main(arguments)
    assert error.value.code == 2
    assert re.search(f"error: .*{message}.*\n$", capsys.readouterr().err)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Return a function that adds a program to the path, which writes a text."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def add(name: str, text: str) -> str:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\necho '{text}'\n")
        path.chmod(0o755)
        return str(path)

    return add


def assert_machine_is_rejected(capsys, message: str) -> None:
    with pytest.raises(SystemExit) as error:
        gpu_check.examine_machine(600)
    assert error.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_python_without_the_required_packages_is_rejected(fake, monkeypatch, capsys):
    python = fake("python", json.dumps({"modules": ["numpy", "torch"]}))
    monkeypatch.setattr(sys, "executable", python)
    assert_machine_is_rejected(capsys, f"{python} has no setuptools, pytest, hypothesis")


def test_the_required_packages_are_documented():
    *names, last = gpu_check.REQUIRED
    text = " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
    assert f"a Python with {', '.join(names)} and {last}" in text
    assert f"{', '.join(names)} and {last}" in " ".join(gpu_check.__doc__.split())


def test_a_gpu_that_torch_cannot_use_is_reported(fake, monkeypatch, capsys):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(sys, "executable", fake("python", json.dumps(CPU)))
    fake("nvidia-smi", "GPU 0: Test GPU")
    message = "torch 2.11 (CUDA 13.0) cannot use the GPU of this machine"
    assert_machine_is_rejected(capsys, message)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu_check.examine_machine(600)["gpu"] is None


# A compiler that never ends.
COMPILER = """#!/bin/sh
case " $* " in
*" -c "*) echo $$ >> {folder}/pids; touch {folder}/ready; exec sleep 600 ;;
*) exec g++ "$@" ;;
esac
"""


@pytest.mark.slow
@pytest.mark.skipif(not AVAILABLE, reason="needs Linux and g++")
def test_a_build_and_its_compilers_are_killed_when_the_time_is_up(
    run, folders, time_is_up, monkeypatch
):
    output, work = folders
    compiler = work / "c++"
    compiler.write_text(COMPILER.format(folder=work))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    root = output / "copy"  # other tests may write into the original meanwhile
    ignore = shutil.ignore_patterns("*.so", "*.egg-info", "build", "__pycache__")
    shutil.copytree(ROOT / "ops_dcnv4", root / "ops_dcnv4", ignore=ignore)
    monkeypatch.setattr(gpu_check_steps, "ROOT", root)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    before = set(root.rglob("*"))
    build, operators, *_ = make_steps(CPU, output, work)
    check, *_ = run([build, operators])
    assert results(check) == {"build": "stopped", operators.name: "left out"}
    assert operators.note == "the build stopped"
    assert_killed(work)
    assert set(root.rglob("*")) == before


def test_the_table_comes_last(folders, time_is_up, monkeypatch, capsys):
    steps = [
        program("slow", HANGS, folders[1]),
        program("next", ""),
        program("other", "", missing="needs a moon"),
    ]
    monkeypatch.setattr(gpu_check, "examine_machine", lambda seconds: CPU)
    monkeypatch.setattr(gpu_check, "make_steps", lambda *_: steps)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as error:
        gpu_check.main(["--seconds", "1e6", "--output", str(folders[0])])
    assert error.value.code == 1
    table = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[-5:]]
    expected = ["step result", "slow stopped", "next passed", "other left", "1 stopped,"]
    assert table == [line.split() for line in expected]


@pytest.mark.slow
def test_a_check_on_the_cpu_passes(tmp_path):
    """Use the installed operators, because compiling them takes minutes.

    The tests that further steps run on the CPU are part of this suite.
    """
    output = tmp_path / "check"
    names = ["small-run", "rates", "bench-operators", "bench-models", "tune"]
    names += ["dcnv4"] * AVAILABLE
    process = subprocess.run(
        [sys.executable, "-m", "tools.gpu_check", "--output", output, "--steps", *names],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    report = json.loads((output / "report.json").read_text())
    steps = {step["name"]: step for step in report["steps"]}
    assert steps.keys() == set(names)
    assert {step["result"] for step in steps.values()} == {"passed"}
    for name in ("rates", "bench-operators", "bench-models", "tune"):
        for figure in steps[name]["figures"]:
            assert figure["measured"] > 0
            assert figure["predicted"] > 0
            assert f"\n{figure['name']} " in process.stdout
        assert steps[name]["figures"]
    assert "tests.gpu.sanitize" in (output / "small-run.log").read_text()
    assert report["machine"]["python"] == sys.version.split()[0]
    assert report["machine"]["gpu"] is None
    with tarfile.open(f"{output}.tar.gz") as archive:
        assert {"./report.json", "./results.jsonl"} <= set(archive.getnames())
