"""Machine code of a kernel, as disassembled by cuobjdump."""

import re
from dataclasses import dataclass, field
from enum import Enum, auto

LAST = {"R": 255, "UR": 63, "P": 7, "UP": 7}  # RZ and URZ are zero, PT and UPT true
BETWEEN_OPERANDS = re.compile(r",\s*(?![^\[]*\])")
GUARD = re.compile(r"@(!?U?P\w+)\s+(.*)")
REGISTER = re.compile(r"(UR|UP|R|P)(\d+|Z|T)((?:\.\w+)*)")
CONSTANT = re.compile(r"c\[0x0\]\[(?:(U?R)(\d+|Z)(?:\.U32)?\+?)?(0x[0-9a-f]+)?\]")
INTEGER = re.compile(r"-?0x[0-9a-f]+|-?\d+")
NUMBERS = {"INF": "inf", "QNAN": "nan", "SNAN": "nan"}


class Kind(Enum):
    """What an operand is."""

    REGISTER = auto()
    UNIFORM = auto()
    PREDICATE = auto()
    UNIFORM_PREDICATE = auto()
    CONSTANT = auto()
    INTEGER = auto()
    NUMBER = auto()
    OTHER = auto()  # an address, a special register or a barrier


KINDS = {
    "R": Kind.REGISTER,
    "UR": Kind.UNIFORM,
    "P": Kind.PREDICATE,
    "UP": Kind.UNIFORM_PREDICATE,
}


@dataclass(frozen=True)
class Operand:
    """An operand of an instruction.

    Attributes:
        index: Number of the register, or offset of the constant.
        value: Value of a literal.
        base: Register that is added to the offset of a constant.
    """

    text: str
    kind: Kind
    index: int = 0
    value: float = 0
    negative: bool = False
    inverted: bool = False
    absolute: bool = False
    suffixes: tuple[str, ...] = ()
    base: "Operand | None" = None

    @classmethod
    def parse(cls, text: str) -> "Operand":
        rest = text.replace(".reuse", "")
        if INTEGER.fullmatch(rest):
            return cls(text, Kind.INTEGER, value=int(rest, 0))
        signs: dict[str, bool] = {}
        for mark, name in (("-", "negative"), ("~", "inverted"), ("!", "inverted")):
            if rest.startswith(mark):
                rest, signs[name] = rest[1:], True
        if rest.startswith("|"):
            rest, signs["absolute"] = rest.replace("|", ""), True
        if match := REGISTER.fullmatch(rest):
            family, number, suffixes = match.groups()
            index = LAST[family] if number in "ZT" else int(number)
            parts = tuple(suffixes.split(".")[1:])
            return cls(text, KINDS[family], index, suffixes=parts, **signs)
        if match := CONSTANT.fullmatch(rest):
            family, number, offset = match.groups()
            base = cls.parse(family + number) if family else None
            return cls(text, Kind.CONSTANT, int(offset or "0", 16), base=base, **signs)
        try:
            number = rest.lstrip("+")
            return cls(text, Kind.NUMBER, value=float(NUMBERS.get(number, number)), **signs)
        except ValueError:
            return cls(text, Kind.OTHER)


@dataclass(frozen=True)
class Instruction:
    """An instruction, e.g. `@!P0 LDG.E.128 R4, desc[UR4][R2.64+0x10]`."""

    address: int
    text: str
    name: str = ""
    modifiers: tuple[str, ...] = ()
    operands: tuple[Operand, ...] = ()
    guard: Operand | None = None

    @classmethod
    def parse(cls, address: int, text: str) -> "Instruction":
        guard, rest = None, text
        if match := GUARD.fullmatch(text):
            guard, rest = Operand.parse(match[1]), match[2]
        operation, _, arguments = rest.partition(" ")
        name, *modifiers = operation.split(".")
        parts = BETWEEN_OPERANDS.split(arguments.strip()) if arguments.strip() else []
        operands = tuple(Operand.parse(part.strip()) for part in parts)
        return cls(address, text, name, tuple(modifiers), operands, guard)


@dataclass
class Program:
    """The instructions of a kernel."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def index_of(self, address: int) -> int:
        """Return the index of the instruction at an address; all take 16 bytes."""
        return address // 16


def parse_listing(listing: str) -> dict[str, Program]:
    """Return the programs in the output of `cuobjdump -sass`, by the kernels' mangled names."""
    programs: dict[str, Program] = {}
    current: Program | None = None
    for line in listing.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            current = programs[match[1]] = Program(match[1])
        elif current and (match := re.match(r"\s+/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;", line)):
            current.instructions.append(Instruction.parse(int(match[1], 16), match[2]))
    return programs
