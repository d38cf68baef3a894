"""Instructions that load, store and add to memory."""

import numpy as np

from tests.sass.instructions import instruction
from tests.sass.memory import AccessError, Memory
from tests.sass.program import Instruction, Operand
from tests.sass.warp import STACK_BYTES, Mask, Warp

SIZES = {"U8": 1, "U16": 2, "64": 8, "128": 16}


def size_of(i: Instruction) -> int:
    """Return the number of bytes per lane."""
    return next((SIZES[m] for m in i.modifiers if m in SIZES), 4)


def load(
    warp: Warp, memory: Memory, destination: Operand, at: Operand, size: int, active: Mask
) -> None:
    words = memory.load(warp.address(at)[active], size)
    for n in range(words.shape[1]):
        values = np.zeros(len(active), np.int64)
        values[active] = words[:, n]
        warp.set(destination, values, active, n)


def store(
    warp: Warp, memory: Memory, at: Operand, source: Operand, size: int, active: Mask
) -> None:
    words = warp.words(source, max(size // 4, 1), active)
    memory.store(warp.address(at)[active], words, size)


@instruction("LDG", "LD")
def load_global(warp: Warp, i: Instruction, active: Mask) -> None:
    load(warp, warp.global_memory, *i.operands[:2], size_of(i), active)


@instruction("STG", "ST")
def store_global(warp: Warp, i: Instruction, active: Mask) -> None:
    store(warp, warp.global_memory, *i.operands[:2], size_of(i), active)


@instruction("LDS")
def load_shared(warp: Warp, i: Instruction, active: Mask) -> None:
    load(warp, warp.shared_memory, *i.operands[:2], size_of(i), active)


@instruction("STS")
def store_shared(warp: Warp, i: Instruction, active: Mask) -> None:
    store(warp, warp.shared_memory, *i.operands[:2], size_of(i), active)


def on_stack(warp: Warp, at: Operand, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return indices of lanes and bytes."""
    begin = warp.address(at)
    if (begin < 0).any() or (begin + size > STACK_BYTES).any():
        raise AccessError(f"{at.text} is outside of the stack")
    return np.arange(len(begin))[:, None], begin[:, None] + np.arange(size)


@instruction("LDL")
def load_local(warp: Warp, i: Instruction, active: Mask) -> None:
    destination, at = i.operands
    size = size_of(i)
    words = np.ascontiguousarray(warp.stack[on_stack(warp, at, size)]).view(np.uint32)
    for n in range(words.shape[1]):
        warp.set(destination, words[:, n], active, n)


@instruction("STL")
def store_local(warp: Warp, i: Instruction, active: Mask) -> None:
    at, source = i.operands
    size = size_of(i)
    lanes, offsets = on_stack(warp, at, size)
    words = warp.words(source, size // 4, active)
    warp.stack[lanes[active], offsets[active]] = np.ascontiguousarray(words).view(np.uint8)


def width_of_reduction(i: Instruction) -> int:
    """Return how many float32 numbers a lane adds."""
    if "ADD" not in i.modifiers or not any(m.startswith("F32") for m in i.modifiers):
        raise NotImplementedError(i.text)
    return next((n for n in (4, 2) if f"F32x{n}" in i.modifiers), 1)


@instruction("REDG", "RED")
def add_to_global(warp: Warp, i: Instruction, active: Mask) -> None:
    at, source = i.operands[:2]
    words = warp.words(source, width_of_reduction(i), active)
    warp.global_memory.add(warp.address(at)[active], words)
