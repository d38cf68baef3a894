"""Instructions on integers and predicates."""

from collections.abc import Callable

import numpy as np

from tests.sass.instructions import instruction, split_carries
from tests.sass.program import Instruction, Kind, Operand
from tests.sass.warp import LANE, LANES, MASK, Integers, Mask, Warp, signed

SPECIAL = {"SR_TID.X": 0, "SR_TID.Y": 1, "SR_TID.Z": 2}
COMPARE: dict[str, Callable] = {
    "EQ": np.equal,
    "NE": np.not_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
}
COMBINE: dict[str, Callable] = {
    "AND": np.logical_and,
    "OR": np.logical_or,
    "XOR": np.logical_xor,
}


def each_lane(function: Callable[..., int], *values: Integers) -> Integers:
    """Compute with Python's integers, which do not overflow, and return 32 bits."""
    results = [function(*(int(v) for v in lane)) & MASK for lane in zip(*values, strict=True)]
    return np.array(results, np.int64)


def truth_table(table: int, x: Integers, y: Integers, z: Integers) -> Integers:
    """Combine bits, or booleans as 0 and -1, with a function of three bits."""
    result = np.zeros(LANES, np.int64)
    for row in range(8):
        if table >> row & 1:
            result |= (x if row & 4 else ~x) & (y if row & 2 else ~y) & (z if row & 1 else ~z)
    return result


@instruction("IADD3", "UIADD3")
def add3(warp: Warp, i: Instruction, active: Mask) -> None:
    destination, carries, rest = split_carries(i.operands)
    total = sum((warp.addend(operand) for operand in rest[:3]), np.zeros(LANES, np.int64))
    if "X" in i.modifiers:
        for carry in rest[3:]:
            total = total + warp.predicate(carry)
    warp.set(destination, total, active)
    for n, carry in enumerate(carries):
        warp.set_predicate(carry, total >> 32 > n, active)


@instruction("VIADD")
def add(warp: Warp, i: Instruction, active: Mask) -> None:
    warp.set(i.operands[0], warp.integer(i.operands[1]) + warp.integer(i.operands[2]), active)


@instruction("IMAD", "UIMAD")
def multiply_add(warp: Warp, i: Instruction, active: Mask) -> None:
    destination, carries, (a, b, c, *carry_in) = split_carries(i.operands)
    x, y = warp.integer(a), warp.integer(b)
    if "WIDE" not in i.modifiers and "HI" not in i.modifiers:
        carry = warp.predicate(carry_in[0]) if "X" in i.modifiers else np.zeros(LANES, bool)
        total = each_lane(lambda x, y, z, c: x * y + z + c, x, y, warp.integer(c), carry)
        return warp.set(destination, total, active)
    if "U32" not in i.modifiers:
        x, y = signed(x), signed(y)
    z = warp.integer64(c)
    wide = [int(p) * int(q) + (int(r) & (1 << 64) - 1) for p, q, r in zip(x, y, z, strict=True)]
    high = np.array([v >> 32 & MASK for v in wide], np.int64)
    if "HI" in i.modifiers:
        return warp.set(destination, high, active)
    warp.set(destination, np.array([v & MASK for v in wide], np.int64), active)
    warp.set(destination, high, active, 1)
    for carry in carries:
        warp.set_predicate(carry, np.array([v >> 64 & 1 for v in wide], bool), active)
    return None


@instruction("LEA", "ULEA")
def scaled_add(warp: Warp, i: Instruction, active: Mask) -> None:
    destination, carries, (a, b, *rest) = split_carries(i.operands)
    if "HI" in i.modifiers:
        x = warp.integer(a)
        if "SX32" in i.modifiers:
            high = np.where(signed(x) < 0, MASK, 0)
        else:
            high = warp.integer(rest.pop(0))
        shift = int(rest.pop(0).value)
        scaled = each_lane(lambda h, low: (h << 32 | low) << shift >> 32, high, x)
        total = scaled + warp.integer(b)
        if "X" in i.modifiers:
            total = total + warp.predicate(rest[0])
    else:
        shifted = warp.bits(a) << int(rest[0].value) & MASK
        total = ((~shifted & MASK) + 1 if a.negative else shifted) + warp.addend(b)
    warp.set(destination, total, active)
    for carry in carries:
        warp.set_predicate(carry, total >> 32 > 0, active)


@instruction("LOP3", "ULOP3")
def logic(warp: Warp, i: Instruction, active: Mask) -> None:
    operands = list(i.operands)
    nonzero = None
    if operands[0].kind in (Kind.PREDICATE, Kind.UNIFORM_PREDICATE):
        nonzero = operands.pop(0)
    destination, a, b, c, table = operands[:5]
    x, y, z = (warp.integer(operand) for operand in (a, b, c))
    result = truth_table(int(table.value), x, y, z) & MASK
    warp.set(destination, result, active)
    if nonzero:
        warp.set_predicate(nonzero, result != 0, active)


@instruction("PLOP3", "UPLOP3")
def predicate_logic(warp: Warp, i: Instruction, active: Mask) -> None:
    x, y, z = (-warp.predicate(operand).astype(np.int64) for operand in i.operands[2:5])
    tables = i.operands[5:7]
    results = [truth_table(int(table.value), x, y, z) != 0 for table in tables]
    for destination, result in zip(i.operands[:2], results, strict=True):
        warp.set_predicate(destination, result, active)


@instruction("SHF", "USHF")
def shift(warp: Warp, i: Instruction, active: Mask) -> None:
    destination, low, by, high = i.operands
    x, n, h = warp.integer(low), warp.integer(by), warp.integer(high)
    if "U64" in i.modifiers or "S64" in i.modifiers:
        n = n & 63
    most = 64 if "U64" in i.modifiers or "S64" in i.modifiers else 32
    if "S32" in i.modifiers or "S64" in i.modifiers:
        h = signed(h)

    def left(h: int, x: int, n: int) -> int:
        return (h << 32 | x) << min(n, most) >> (32 if "HI" in i.modifiers else 0)

    def right(h: int, x: int, n: int) -> int:
        if "HI" in i.modifiers and most == 32:
            return h >> min(n, 32)
        return (h << 32 | x) >> min(n, most) >> (32 if "HI" in i.modifiers else 0)

    warp.set(destination, each_lane(left if "L" in i.modifiers else right, h, x, n), active)


@instruction("SEL", "USEL")
def select(warp: Warp, i: Instruction, active: Mask) -> None:
    destination, a, b, condition = i.operands
    chosen = np.where(warp.predicate(condition), warp.integer(a), warp.integer(b))
    warp.set(destination, chosen, active)


def set_comparison(warp: Warp, i: Instruction, result: Mask, combine: str, active: Mask) -> None:
    """Write a comparison, and its opposite, each combined with the fifth operand."""
    other = warp.predicate(i.operands[4])
    warp.set_predicate(i.operands[0], COMBINE[combine](result, other), active)
    warp.set_predicate(i.operands[1], COMBINE[combine](~result, other), active)


@instruction("ISETP", "UISETP")
def compare(warp: Warp, i: Instruction, active: Mask) -> None:
    x, y = warp.integer(i.operands[2]), warp.integer(i.operands[3])
    relation, *_ = i.modifiers
    combine = next(m for m in i.modifiers if m in COMBINE)
    if "U32" not in i.modifiers:
        x, y = signed(x), signed(y)
    result = COMPARE[relation](x, y)
    if "EX" in i.modifiers:  # the upper halves of numbers whose lower halves were compared before
        strict = relation if relation in ("EQ", "NE") else relation[0] + "T"
        differ = COMPARE[strict](x, y) if strict != "EQ" else np.zeros(LANES, bool)
        result = differ | ((x == y) & warp.predicate(i.operands[5]))
    set_comparison(warp, i, result, combine, active)


@instruction("VIMNMX", "IMNMX", "UIMNMX", "VIADDMNMX")
def extreme(warp: Warp, i: Instruction, active: Mask) -> None:
    destination, a, *rest, minimum = i.operands[: 5 if i.name == "VIADDMNMX" else 4]
    x, y = warp.integer(a), warp.integer(rest[-1])
    if i.name == "VIADDMNMX":
        x = x + warp.integer(rest[0]) & MASK
    if "U32" not in i.modifiers:
        x, y = signed(x), signed(y)
    result = np.where(warp.predicate(minimum), np.minimum(x, y), np.maximum(x, y))
    if "RELU" in i.modifiers:
        result = np.maximum(result, 0)
    warp.set(destination, result, active)


@instruction("IABS")
def absolute(warp: Warp, i: Instruction, active: Mask) -> None:
    warp.set(i.operands[0], np.abs(signed(warp.integer(i.operands[1]))), active)


@instruction("BREV", "UBREV")
def reverse_bits(warp: Warp, i: Instruction, active: Mask) -> None:
    values = each_lane(lambda v: int(f"{v:032b}"[::-1], 2), warp.integer(i.operands[1]))
    warp.set(i.operands[0], values, active)


@instruction("FLO", "UFLO")
def find_leading_one(warp: Warp, i: Instruction, active: Mask) -> None:
    """Return the position of the highest bit, or with SH its distance from bit 31; -1 if none."""
    if "U32" not in i.modifiers:
        raise NotImplementedError(i.text)

    def leading(value: int) -> int:
        position = value.bit_length() - 1
        return 31 - position if "SH" in i.modifiers and value else position

    warp.set(i.operands[0], each_lane(leading, warp.integer(i.operands[-1])), active)


@instruction("PRMT", "UPRMT")
def permute_bytes(warp: Warp, i: Instruction, active: Mask) -> None:
    destination, a, selector, b = i.operands

    def permuted(low: int, high: int, selection: int) -> int:
        result = 0
        for k in range(4):
            choice = selection >> 4 * k & 0xF
            byte = (low | high << 32) >> 8 * (choice & 7) & 0xFF
            if choice & 8:  # replicate the sign
                byte = 0xFF if byte & 0x80 else 0
            result |= byte << 8 * k
        return result

    values = each_lane(permuted, warp.integer(a), warp.integer(b), warp.integer(selector))
    warp.set(destination, values, active)


@instruction("MOV", "UMOV", "R2UR")
def move(warp: Warp, i: Instruction, active: Mask) -> None:
    warp.set(i.operands[0], warp.integer(i.operands[1]), active)


@instruction("CS2R")
def move_special(warp: Warp, i: Instruction, active: Mask) -> None:
    zero = warp.integer(i.operands[1])
    warp.set(i.operands[0], zero, active)
    if "32" not in i.modifiers:
        warp.set(i.operands[0], zero, active, 1)


@instruction("S2R", "S2UR")
def read_special(warp: Warp, i: Instruction, active: Mask) -> None:
    name = i.operands[1].text
    if name in SPECIAL:
        values = warp.threads[SPECIAL[name]]
    elif name == "SR_LANEID":
        values = LANE
    elif name == "SR_CgaCtaId":
        values = np.zeros(LANES, np.int64)
    elif name.startswith("SR_CTAID."):
        values = np.full(LANES, warp.block["XYZ".index(name[-1])])
    else:
        raise NotImplementedError(i.text)
    warp.set(i.operands[0], values, active)


@instruction("P2R")
def pack_predicates(warp: Warp, i: Instruction, active: Mask) -> None:
    destination, _, other, mask = i.operands
    chosen = int(mask.value)
    packed = sum(
        (warp.predicates[n].astype(np.int64) << n for n in range(7)), np.zeros(LANES, np.int64)
    )
    warp.set(destination, packed & chosen | warp.integer(other) & ~chosen, active)


@instruction("R2P")
def unpack_predicates(warp: Warp, i: Instruction, active: Mask) -> None:
    _, source, mask = i.operands
    bits = warp.integer(source)
    for n in range(7):
        if int(mask.value) >> n & 1:
            warp.predicates[n][active] = (bits >> n & 1).astype(bool)[active]


def bits_of(mask: Mask) -> Integers:
    return np.full(LANES, int((mask.astype(np.int64) << LANE).sum()), np.int64)


@instruction("VOTE", "VOTEU")
def vote(warp: Warp, i: Instruction, active: Mask) -> None:
    *destinations, condition = i.operands
    holds = warp.predicate(condition) & active
    if "ANY" in i.modifiers:
        result = bool(holds.any())
    elif "ALL" in i.modifiers:
        result = bool((holds == active).all())
    else:
        raise NotImplementedError(i.text)
    for destination in destinations:
        if destination.kind in (Kind.PREDICATE, Kind.UNIFORM_PREDICATE):
            warp.set_predicate(destination, np.full(LANES, result), active)
        else:
            warp.set(destination, bits_of(holds), active)


@instruction("SHFL")
def shuffle(warp: Warp, i: Instruction, active: Mask) -> None:
    within, destination, source, operand, limits = i.operands
    values = warp.integer(source).copy()
    by, limit = warp.integer(operand), warp.integer(limits)
    segment, clamp = limit >> 8 & 31, limit & 31
    last = LANE & segment | clamp & ~segment
    if "IDX" in i.modifiers:
        other = LANE & segment | by & ~segment & 31
    elif "BFLY" in i.modifiers:
        other = LANE ^ by
    elif "DOWN" in i.modifiers:
        other = LANE + by
    else:
        other = LANE - by
    exists = other >= last if "UP" in i.modifiers else other <= last
    other = np.where(exists, other, LANE)
    if not active[other[active]].all():
        raise RuntimeError(f"a shuffle reads from an inactive lane: {i.text}")
    warp.set(destination, values[other], active)
    warp.set_predicate(within, exists, active)


def constant_offset(warp: Warp, operand: Operand) -> Integers:
    if operand.kind is not Kind.CONSTANT:
        raise NotImplementedError(operand.text)
    base = warp.integer(operand.base) if operand.base else np.zeros(LANES, np.int64)
    return base + operand.index


@instruction("LDC", "ULDC")
def load_constant(warp: Warp, i: Instruction, active: Mask) -> None:
    destination, source = i.operands
    offsets = constant_offset(warp, source)
    size = 1 if "U8" in i.modifiers else 2 if "U16" in i.modifiers else 4
    for word in range(2 if "64" in i.modifiers else 1):
        values = np.zeros(LANES, np.int64)
        for lane in np.flatnonzero(active):
            begin = int(offsets[lane]) + 4 * word
            if not 0 <= begin <= len(warp.constants) - size:
                raise RuntimeError(f"a constant is out of bounds: {i.text}")
            values[lane] = int.from_bytes(warp.constants[begin : begin + size], "little")
        warp.set(destination, values, active, word)
