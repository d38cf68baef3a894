"""Kill a program at a point that does not depend on the speed of the machine."""

import signal

from tests import processes

_PROGRAM = """
import os, runpy, signal, sys

_, writes, module, *arguments = sys.argv
replace, left = os.replace, int(writes)

def replace_and_die(source, target):
    global left
    replace(source, target)
    left -= str(target).endswith(".pth")
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = replace_and_die
sys.argv = [module, *arguments]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def run_until_killed(module: str, *arguments: object, writes: int = 1) -> None:
    """Run `python -m module arguments`, and kill it when its n-th checkpoint is complete.

    Args:
        writes: Number of checkpoints (`*.pth`) to write before SIGKILL.
    """
    process = processes.run("-c", _PROGRAM, writes, module, *arguments)
    assert process.returncode == -signal.SIGKILL, process.stderr
