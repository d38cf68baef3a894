"""The operators of ops_dcnv4_cuda_model on emulated machine code instead of emulated C++.

An operator's host code runs as usual; its launches arrive here with the bytes of their parameters.
Therefore nothing here repeats the layout of a struct.
"""

import contextlib
import ctypes
import functools
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.cuda_model.build import load_operators
from tests.sass import compiler
from tests.sass.launch import BlockCounts, Index, launch
from tests.sass.memory import Memory, of_process

OPERATORS = torch.ops.ops_dcnv4_cuda_model
Launcher = ctypes.CFUNCTYPE(
    None,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_size_t,
)


@dataclass
class Launch:
    """A kernel that ran."""

    kernel: str
    grid: Index
    blocks: dict[Index, BlockCounts]


@functools.cache
def load() -> Path:
    """Load the operators, and let tensors created from now on have exact bounds."""
    library = load_operators()
    OPERATORS.guard_tensors(False)
    return library


@functools.cache
def symbols() -> dict[int, str]:
    """Return the names of the library's functions by their addresses in its file."""
    lines = subprocess.run(["nm", str(load())], capture_output=True, text=True, check=True).stdout
    parts = [line.split() for line in lines.splitlines()]
    return {int(part[0], 16): part[2] for part in parts if len(part) == 3}


@contextlib.contextmanager
def machine_code(say: Callable[[str], None] = lambda line: None) -> Iterator[list[Launch]]:
    """Run launches as machine code, and append them to the returned list."""
    launches: list[Launch] = []
    errors: list[Exception] = []

    def receive(kernel, parameters, size, grid, block, shared_bytes) -> None:
        try:
            name = symbols()[OPERATORS.address_in_file(kernel)]
            say(compiler.instantiation(name))
            extents = OPERATORS.memory_of_tensors()
            memory = Memory(map(of_process, extents[::2], extents[1::2]))
            sizes = tuple(grid[:3])
            blocks = launch(
                compiler.kernel(name),
                sizes,
                tuple(block[:3]),
                ctypes.string_at(parameters, size),
                memory,
                shared_bytes,
            )
            launches.append(Launch(name, sizes, blocks))
        except Exception as error:  # cannot pass through the operator
            errors.append(error)

    load()
    launcher = Launcher(receive)
    OPERATORS.set_launcher(ctypes.cast(launcher, ctypes.c_void_p).value)
    try:
        yield launches
    finally:
        OPERATORS.set_launcher(0)
    if errors:
        raise errors[0]
