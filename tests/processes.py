"""Run Python programs in new processes that have imported the slow libraries already.

Importing PyTorch, timm and MMEngine takes four seconds, a fork of a process that did so takes
milliseconds. That process has not imported this project: each program does, as a user's would.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
# Modules that are not installed are left out. MMDetection is not among them, as it needs operators
# of MMCV, which this project provides.
CONTEXT.set_forkserver_preload(
    [
        *("torch", "torchvision", "timm", "torch.utils.tensorboard"),
        *("mmengine.runner", "matplotlib.pyplot", "scipy.stats", "tests.fast_configs"),
    ]
)

TIMEOUT = 300  # seconds


@dataclass(frozen=True)
class Ended:
    """How a program ended, and what it wrote.

    Attributes:
        returncode: Exit code, or minus the number of the signal that killed the program.
    """

    returncode: int
    stdout: str
    stderr: str

    def checked(self) -> "Ended":
        """Assert that the program succeeded."""
        assert self.returncode == 0, self.stderr[-5000:]
        return self


def _run(folder: str, environment: Mapping[str, str], flag: str, program: str, *arguments: str):
    os.setpgid(0, 0)  # as a shell does, so that signals reach the program's own processes
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY), descriptor)
    multiprocessing.set_start_method(None, force=True)  # the default, not that of this module
    os.environ.clear()
    os.environ.update(environment)
    # MMDetection imports it for language models, which takes two seconds.
    sys.modules["transformers"] = None  # type: ignore[assignment]
    sys.argv = [flag, *arguments]
    try:
        if flag == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            exec(program, {"__name__": "__main__"})
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


class Running:
    """A running program."""

    def __init__(self, arguments: Sequence[object], environment: Mapping[str, str] | None):
        self._folder = tempfile.TemporaryDirectory()
        self._output = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        for path in self._output:
            path.touch()
        complete = os.environ | (environment or {})
        texts = map(str, arguments)
        self._process = CONTEXT.Process(target=_run, args=(self._folder.name, complete, *texts))
        self._process.start()
        self.pid: int = self._process.pid

    def is_running(self) -> bool:
        return self._process.is_alive()

    def wait(self) -> Ended:
        """Return what the program wrote when it has ended; kill it after `TIMEOUT`."""
        self._process.join(TIMEOUT)
        self._process.kill()
        self._process.join()
        with self._folder:
            return Ended(self._process.exitcode, *(path.read_text() for path in self._output))


def start(*arguments: object, environment: Mapping[str, str] | None = None) -> Running:
    """Start `python -m MODULE ...` or `python -c CODE ...` in the current folder.

    Args:
        arguments: Arguments of Python, beginning with `-m` or `-c`.
        environment: Variables that differ from those of this process.
    """
    return Running(arguments, environment)


def run(*arguments: object, environment: Mapping[str, str] | None = None) -> Ended:
    """Run a program like `start`, and wait until it ends."""
    return start(*arguments, environment=environment).wait()


def run_distributed(*arguments: object, environments: Sequence[dict] = ({}, {})) -> list[Ended]:
    """Run a program in several processes, each with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    world = str(len(environments))
    same = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
    same |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    running = [
        start(*arguments, environment=same | {"RANK": str(i), "LOCAL_RANK": str(i)} | own)
        for i, own in enumerate(environments)
    ]
    return [process.wait() for process in running]
