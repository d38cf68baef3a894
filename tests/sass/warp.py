"""Registers of a warp, and how instructions read and write them."""

import re

import numpy as np
import numpy.typing as npt

from tests.sass.memory import Memory
from tests.sass.program import Instruction, Kind, Operand

LANES = 32
MASK = 0xFFFFFFFF
LANE = np.arange(LANES)
ADDRESS = re.compile(r"(?:desc\[UR\d+\])?\[(.*)\]")
STACK_POINTER = 0x28  # offset of its start among the constants
STACK_BYTES = 1024

Integers = npt.NDArray[np.int64]  # from 0 to 2^32 - 1, or signed
Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


def signed(values: Integers) -> Integers:
    return (values ^ 0x80000000) - 0x80000000


def from_bfloat16(bits: npt.NDArray[np.uint16]) -> Floats:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: npt.NDArray) -> npt.NDArray[np.uint16]:
    """Round numbers to the nearest bfloat16 and return its bits."""
    with np.errstate(over="ignore"):
        near = values.astype(np.float32)
    # To odd, if not exact: rounding once more then is as good as rounding once.
    odd = np.where(np.abs(near) > np.abs(values), np.nextafter(near, np.float32(0)), near)
    bits = odd.astype(np.float32).view(np.uint32) | (odd != values)
    rounding = (0x7FFF + (bits >> 16 & 1)) * np.isfinite(values)
    return (bits + rounding.astype(np.uint32) >> 16).astype(np.uint16)


class Warp:
    """The state of 32 lanes. Registers 255 and 63 are zero, predicate 7 is true."""

    def __init__(
        self,
        threads: npt.NDArray[np.int64],
        block: tuple[int, int, int],
        constants: bytes,
        global_memory: Memory,
        shared_memory: Memory,
    ) -> None:
        """Start a warp.

        Args:
            threads: (3, 32) indices of the threads in the block; -1 for lanes without a thread.
            block: Index of the block.
            constants: The constants of the launch, which include the parameters.
        """
        self.threads, self.block, self.constants = threads, block, constants
        self.global_memory, self.shared_memory = global_memory, shared_memory
        self.registers = np.zeros((256, LANES), np.int64)
        self.predicates = np.zeros((8, LANES), bool)
        self.predicates[7] = True
        self.uniform = [0] * 64
        self.uniform_predicates = [False] * 7 + [True]
        self.stack = np.zeros((LANES, STACK_BYTES), np.uint8)
        self.next = np.zeros(LANES, np.int64)  # index of each lane's next instruction
        self.alive = threads[0] >= 0

    # ---- Reading

    def constant(self, offset: int) -> int:
        return int.from_bytes(self.constants[offset : offset + 4], "little")

    def bits(self, operand: Operand) -> Integers:
        """Return an operand without its sign, as 32 bits."""
        kind = operand.kind
        if kind is Kind.REGISTER:
            return self.registers[operand.index]
        if kind is Kind.UNIFORM:
            return np.full(LANES, self.uniform[operand.index], np.int64)
        if kind is Kind.INTEGER:
            return np.full(LANES, int(operand.value) & MASK, np.int64)
        if kind is Kind.CONSTANT and operand.base is None:
            return np.full(LANES, self.constant(operand.index), np.int64)
        if kind is Kind.OTHER and operand.text == "SRZ":
            return np.zeros(LANES, np.int64)
        raise NotImplementedError(f"operand {operand.text}")

    def integer(self, operand: Operand) -> Integers:
        values = self.bits(operand)
        if operand.inverted:
            values = ~values & MASK
        return -values & MASK if operand.negative else values

    def addend(self, operand: Operand) -> Integers:
        """Return a term of a sum whose carry counts: up to 2^32 for a subtraction of zero."""
        values = self.bits(operand)
        if operand.negative:
            return (~values & MASK) + 1
        return ~values & MASK if operand.inverted else values

    def integer64(self, operand: Operand) -> Integers:
        """Return a pair of registers or constants as a signed number of 64 bits."""
        pair = self.bits64(operand)
        return -pair if operand.negative else pair

    def bits64(self, operand: Operand) -> Integers:
        index = operand.index
        if operand.kind is Kind.REGISTER:
            if index == 255:
                return np.zeros(LANES, np.int64)
            return self.registers[index] | self.registers[index + 1] << 32
        if operand.kind is Kind.UNIFORM:
            if index == 63:
                return np.zeros(LANES, np.int64)
            pair = np.uint64(self.uniform[index] | self.uniform[index + 1] << 32)
            return np.full(LANES, pair, np.uint64).view(np.int64)
        if operand.kind is Kind.CONSTANT:
            pair = np.uint64(self.constant(operand.index) | self.constant(operand.index + 4) << 32)
            return np.full(LANES, pair, np.uint64).view(np.int64)
        raise NotImplementedError(f"operand {operand.text} of 64 bits")

    def float(self, operand: Operand) -> Floats:
        if operand.kind is Kind.NUMBER or operand.kind is Kind.INTEGER:
            values = np.full(LANES, operand.value, np.float32)
        else:
            values = self.bits(operand).astype(np.uint32).view(np.float32)
        values = np.abs(values) if operand.absolute else values
        return -values if operand.negative else values

    def pair(self, operand: Operand, bfloat16: bool) -> npt.NDArray[np.float64]:
        """Return a pair of float16 or bfloat16 numbers, (2, 32), the lower first."""
        if operand.kind is Kind.NUMBER or operand.kind is Kind.INTEGER:
            values = np.full((2, LANES), float(operand.value))
        else:
            packed = self.bits(operand).astype(np.uint32).view(np.uint16).reshape(LANES, 2).T
            values = from_bfloat16(packed) if bfloat16 else packed.view(np.float16)
            values = values.astype(np.float64)
            if "H0_H0" in operand.suffixes:
                values = values[[0, 0]]
            elif "H1_H1" in operand.suffixes:
                values = values[[1, 1]]
        values = np.abs(values) if operand.absolute else values
        return -values if operand.negative else values

    def predicate(self, operand: Operand) -> Mask:
        if operand.kind is Kind.PREDICATE:
            values = self.predicates[operand.index]
        elif operand.kind is Kind.UNIFORM_PREDICATE:
            values = np.full(LANES, self.uniform_predicates[operand.index])
        else:
            raise NotImplementedError(f"predicate {operand.text}")
        return ~values if operand.inverted else values

    def address(self, operand: Operand) -> Integers:
        """Return the addresses of e.g. `desc[UR4][R2.64+UR8+-0x10]`."""
        match = ADDRESS.fullmatch(operand.text)
        if match is None:
            raise NotImplementedError(f"address {operand.text}")
        total = np.zeros(LANES, np.int64)
        in_global = operand.text.startswith("desc")
        for term in match[1].split("+"):
            part = Operand.parse(term)
            if part.kind is Kind.INTEGER:
                total = total + int(part.value)
            elif "64" in part.suffixes or (part.kind is Kind.UNIFORM and in_global):
                total = total + self.integer64(part)
            else:
                total = total + self.integer(part)
        return total

    # ---- Writing

    def set(self, operand: Operand, values: npt.NDArray, active: Mask, offset: int = 0) -> None:
        """Write integers or float32 numbers to a register, in the active lanes."""
        if values.dtype == np.float32:
            values = values.view(np.uint32)
        values = values.astype(np.int64) & MASK
        if operand.kind is Kind.UNIFORM:
            if operand.index != 63:
                self.uniform[operand.index + offset] = int(values[active][0])
        elif operand.index != 255:
            self.registers[operand.index + offset][active] = values[active]

    def set64(self, operand: Operand, values: Integers, active: Mask) -> None:
        self.set(operand, values & MASK, active)
        self.set(operand, values >> 32 & MASK, active, 1)

    def set_pair(self, operand: Operand, values: npt.NDArray, active: Mask, bfloat16: bool) -> None:
        """Round a pair of numbers, (2, 32), and write it to a register."""
        with np.errstate(over="ignore", invalid="ignore"):
            bits = to_bfloat16(values) if bfloat16 else values.astype(np.float16).view(np.uint16)
        lower, upper = bits.astype(np.int64)
        self.set(operand, lower | upper << 16, active)

    def set_predicate(self, operand: Operand, values: Mask, active: Mask) -> None:
        if operand.index == 7:
            return
        if operand.kind is Kind.UNIFORM_PREDICATE:
            self.uniform_predicates[operand.index] = bool(values[active][0])
        else:
            self.predicates[operand.index][active] = values[active]

    def words(self, operand: Operand, count: int, active: Mask) -> npt.NDArray[np.uint32]:
        """Return (active lanes, count) consecutive registers."""
        index = operand.index
        rows = [index] * count if index == 255 else range(index, index + count)
        return np.stack([self.registers[row][active] for row in rows], 1).astype(np.uint32)

    # ---- Control

    def ready(self) -> tuple[int, Mask]:
        """Return the index of the next instruction and the lanes that execute it.

        Lanes that are behind run first, so that a warp reconverges after structured branches.
        """
        index = int(self.next[self.alive].min())
        return index, self.alive & (self.next == index)

    def executing(self, instruction: Instruction, active: Mask) -> Mask:
        if instruction.guard is None:
            return active
        return active & self.predicate(instruction.guard)
