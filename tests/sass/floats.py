"""Instructions on floating-point numbers."""

import numpy as np

from tests.sass.instructions import instruction
from tests.sass.integers import COMPARE, set_comparison
from tests.sass.program import Instruction, Kind
from tests.sass.warp import LANES, MASK, Mask, Warp, signed


def wide(values: np.ndarray) -> np.ndarray:
    """Convert to float64, in which products of float32 are exact."""
    return values.astype(np.float64)


def rounded(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(np.float32)


@instruction("FADD")
def add(warp: Warp, i: Instruction, active: Mask) -> None:
    destination, a, b = i.operands
    with np.errstate(over="ignore", invalid="ignore"):
        warp.set(destination, warp.float(a) + warp.float(b), active)


@instruction("FMUL")
def multiply(warp: Warp, i: Instruction, active: Mask) -> None:
    destination, a, b = i.operands
    with np.errstate(over="ignore", invalid="ignore"):
        warp.set(destination, warp.float(a) * warp.float(b), active)


@instruction("FFMA")
def multiply_add(warp: Warp, i: Instruction, active: Mask) -> None:
    destination, a, b, c = i.operands
    with np.errstate(invalid="ignore"):
        exact = wide(warp.float(a)) * warp.float(b) + warp.float(c)
    warp.set(destination, rounded(exact), active)


@instruction("FMNMX")
def extreme(warp: Warp, i: Instruction, active: Mask) -> None:
    destination, a, b, minimum = i.operands
    x, y = warp.float(a), warp.float(b)
    warp.set(destination, np.where(warp.predicate(minimum), np.fmin(x, y), np.fmax(x, y)), active)


@instruction("FSEL")
def select(warp: Warp, i: Instruction, active: Mask) -> None:
    destination, a, b, condition = i.operands
    chosen = np.where(warp.predicate(condition), warp.float(a), warp.float(b))
    warp.set(destination, chosen, active)


@instruction("FSETP")
def compare(warp: Warp, i: Instruction, active: Mask) -> None:
    x, y = warp.float(i.operands[2]), warp.float(i.operands[3])
    relation, combine = [m for m in i.modifiers if m != "FTZ"][:2]
    unordered = np.isnan(x) | np.isnan(y)
    result = COMPARE[relation[:2]](x, y)
    result = result | unordered if relation.endswith("U") else result & ~unordered
    set_comparison(warp, i, result, combine, active)


def to_integer(i: Instruction, values: np.ndarray) -> np.ndarray:
    """Round as an instruction's modifiers say."""
    if "FLOOR" in i.modifiers:
        return np.floor(values)
    if "CEIL" in i.modifiers:
        return np.ceil(values)
    return np.trunc(values) if "TRUNC" in i.modifiers else np.rint(values)


@instruction("F2I")
def convert_to_integer(warp: Warp, i: Instruction, active: Mask) -> None:
    values = to_integer(i, np.nan_to_num(wide(warp.float(i.operands[1])), nan=0))
    low, high = (0, MASK) if "U32" in i.modifiers else (-(2**31), 2**31 - 1)
    warp.set(i.operands[0], np.clip(values, low, high).astype(np.int64), active)


@instruction("FRND")
def round_to_integer(warp: Warp, i: Instruction, active: Mask) -> None:
    values = to_integer(i, warp.float(i.operands[1]))
    warp.set(i.operands[0], values.astype(np.float32), active)


@instruction("I2F", "I2FP")
def convert_from_integer(warp: Warp, i: Instruction, active: Mask) -> None:
    values = warp.integer(i.operands[1])
    values = values if "U32" in i.modifiers else signed(values)
    result = values.astype(np.float32)
    if "RP" in i.modifiers:  # round up
        below = wide(result) < values
        result = np.where(below, np.nextafter(result, np.float32(np.inf)), result)
    warp.set(i.operands[0], result.astype(np.float32), active)


@instruction("MUFU")
def approximate(warp: Warp, i: Instruction, active: Mask) -> None:
    values = wide(warp.float(i.operands[1]))
    with np.errstate(divide="ignore", over="ignore"):
        if "RCP" in i.modifiers:
            result = 1 / values
        elif "EX2" in i.modifiers:
            result = np.exp2(values)
        else:
            raise NotImplementedError(i.text)
    warp.set(i.operands[0], rounded(result), active)


def is_bfloat16(i: Instruction) -> bool:
    return any(modifier.startswith("BF16") for modifier in i.modifiers)


@instruction("F2FP")
def pack(warp: Warp, i: Instruction, active: Mask) -> None:
    destination, high, low = i.operands[:3]
    pair = np.stack([warp.float(low), warp.float(high)])
    warp.set_pair(destination, pair, active, is_bfloat16(i))


@instruction("HADD2")
def add_pairs(warp: Warp, i: Instruction, active: Mask) -> None:
    destination, *terms = i.operands
    a, b = (warp.pair(term, is_bfloat16(i)) for term in terms)
    with np.errstate(invalid="ignore"):
        total = a + b
    if "F32" in i.modifiers:
        warp.set(destination, rounded(total[0]), active)
    else:
        warp.set_pair(destination, total, active, is_bfloat16(i))


@instruction("HMUL2")
def multiply_pairs(warp: Warp, i: Instruction, active: Mask) -> None:
    destination, *factors = i.operands
    a, b = (warp.pair(factor, is_bfloat16(i)) for factor in factors)
    with np.errstate(invalid="ignore"):
        warp.set_pair(destination, a * b, active, is_bfloat16(i))


@instruction("HFMA2")
def multiply_add_pairs(warp: Warp, i: Instruction, active: Mask) -> None:
    destination, *rest = i.operands
    factors = []
    while rest:  # a register, or two literals, the upper first
        operand = rest.pop(0)
        if operand.kind in (Kind.NUMBER, Kind.INTEGER):
            pair = float(rest.pop(0).value), float(operand.value)
            factors.append(np.repeat(np.array(pair)[:, None], LANES, 1))
        else:
            factors.append(warp.pair(operand, is_bfloat16(i)))
    a, b, c = factors
    with np.errstate(invalid="ignore"):
        warp.set_pair(destination, a * b + c, active, is_bfloat16(i))
