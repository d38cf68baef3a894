"""Execution of a kernel: blocks, warps and control flow."""

import itertools
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from tests.sass import floats, integers, transfers  # noqa: F401  register their instructions
from tests.sass.instructions import KNOWN
from tests.sass.memory import Memory, Region
from tests.sass.program import Kind, Program
from tests.sass.transfers import width_of_reduction
from tests.sass.warp import LANES, STACK_BYTES, STACK_POINTER, Mask, Warp

Index = tuple[int, int, int]

PARAMETERS = 0x210  # offset of a kernel's parameters among the constants of sm_90
SHARED = 0x400  # address of a block's shared memory, after the part that the driver reserves
SECTOR = 32  # bytes
WITHOUT_EFFECT = {"NOP", "BSSY", "BSYNC", "WARPSYNC", "YIELD"}  # see Warp.ready


@dataclass
class BlockCounts:
    """Counts of what the warps of a block executed.

    Attributes:
        warps: Number of warps.
        instructions: Instructions that the warps issued, by name.
        sectors: Sectors of 32 bytes that reductions added to.
    """

    warps: int
    instructions: Counter[str] = field(default_factory=Counter)
    sectors: int = 0


def launch(
    program: Program,
    grid: Index,
    block: Index,
    parameters: bytes,
    memory: Memory,
    shared_bytes: int = 0,
    blocks: Iterable[Index] | None = None,
) -> dict[Index, BlockCounts]:
    """Run a kernel and return the counts of each block.

    Args:
        program: The kernel.
        grid: Size of the grid, as for cudaLaunchKernel.
        block: Size of a block.
        parameters: The kernel's parameters, as laid out in memory.
        memory: The global memory.
        shared_bytes: Size of the dynamic shared memory.
        blocks: The blocks to run; all by default.
    """
    constants = bytearray(PARAMETERS) + parameters
    struct.pack_into("<6I", constants, 0, *block, *grid)
    struct.pack_into("<I", constants, STACK_POINTER, STACK_BYTES)
    counts = {}
    for index in blocks or itertools.product(*map(range, grid)):
        shared = Memory([Region(SHARED, np.full(shared_bytes, 0xFF, np.uint8))])
        warps = [
            Warp(threads, index, bytes(constants), memory, shared) for threads in threads_of(block)
        ]
        counts[index] = run_block(program, warps)
    return counts


def threads_of(block: Index) -> Iterator[np.ndarray]:
    """Yield the indices of each warp's threads; -1 for lanes without a thread."""
    x, y, z = block
    for first in range(0, x * y * z, LANES):
        linear = first + np.arange(LANES)
        threads = np.stack([linear % x, linear // x % y, linear // (x * y)])
        threads[:, linear >= x * y * z] = -1
        yield threads


def run_block(program: Program, warps: list[Warp]) -> BlockCounts:
    counts = BlockCounts(len(warps))
    while waiting := [warp for warp in warps if warp.alive.any()]:
        for warp in waiting:
            run_to_barrier(program, warp, counts)
    return counts


def run_to_barrier(program: Program, warp: Warp, counts: BlockCounts) -> None:
    """Run a warp until it ends or waits for the other warps of its block."""
    while warp.alive.any():
        index, active = warp.ready()
        i = program.instructions[index]
        counts.instructions[i.name] += 1
        warp.next[active] = index + 1
        executing = warp.executing(i, active)
        if i.name == "BAR":
            return
        if i.name == "BRA":
            branch(program, warp, index, executing)
        elif i.name == "EXIT":
            warp.alive &= ~executing
        elif i.name in WITHOUT_EFFECT or not executing.any():
            continue
        elif i.name in KNOWN:
            if i.name in ("RED", "REDG"):
                begin = warp.address(i.operands[0])[executing]
                offsets = np.arange(0, 4 * width_of_reduction(i), 4)
                counts.sectors += len(np.unique((begin[:, None] + offsets) // SECTOR))
            KNOWN[i.name](warp, i, executing)
        else:
            raise NotImplementedError(i.text)


def branch(program: Program, warp: Warp, index: int, executing: Mask) -> None:
    i = program.instructions[index]
    if "DIV" in i.modifiers:  # taken by warps that are not converged, which are then reconverged
        return
    *conditions, target = i.operands
    for condition in conditions:
        if condition.kind in (Kind.PREDICATE, Kind.UNIFORM_PREDICATE):
            executing = executing & warp.predicate(condition)
    warp.next[executing] = program.index_of(int(target.value))
