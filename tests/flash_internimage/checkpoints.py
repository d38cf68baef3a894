"""Write checkpoints as torch.save does, and malicious ones."""

import importlib
import pickle
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from flash_internimage.checkpoints import load_checkpoint

FORMATS = pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])


def write(contents: object, path: Path, archive: bool = True) -> None:
    torch.save(contents, path, _use_new_zipfile_serialization=archive)


def write_program(program: bytes, path: Path, archive: bool = True) -> None:
    """Write a file in the format of torch.save with the given pickle as its contents."""
    if archive:
        writer = torch._C.PyTorchFileWriter(str(path))
        writer.write_record("data.pkl", program, len(program))
        writer.write_end_of_file()
    else:
        header = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {})
        parts = [*(pickle.dumps(part, 2) for part in header), program, pickle.dumps([], 2)]
        path.write_bytes(b"".join(parts))


def forget(library: ModuleType) -> None:
    Path(library.__file__).unlink()
    del sys.modules["foreign_library"]
    importlib.invalidate_caches()


def literal(value: object) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def dotted(module: str, name: str) -> bytes:
    """Return the opcode of protocol 4, whose names may contain dots (nested attributes)."""
    return literal(module) + literal(name) + pickle.STACK_GLOBAL


def call(function: bytes, *args: bytes) -> bytes:
    return function + pickle.MARK + b"".join(args) + pickle.TUPLE + pickle.REDUCE


def program(item: bytes) -> bytes:
    """Return the pickle of {"item": item}."""
    return b"\x80\x04}" + literal("item") + item + pickle.SETITEM + pickle.STOP


def assert_refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged or not a .*{message}"):
        load_checkpoint(path)


class RunsCommand:
    """Object that runs a shell command when it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return subprocess.getoutput, (self.command,)
