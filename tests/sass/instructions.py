"""The registry of the instructions that the emulator knows."""

from collections.abc import Callable

from tests.sass.program import Instruction, Kind, Operand
from tests.sass.warp import Mask, Warp

Execute = Callable[[Warp, Instruction, Mask], None]
KNOWN: dict[str, Execute] = {}


def instruction(*names: str) -> Callable[[Execute], Execute]:
    """Register a function that executes instructions with these names in the active lanes."""

    def register(execute: Execute) -> Execute:
        KNOWN.update(dict.fromkeys(names, execute))
        return execute

    return register


def split_carries(operands: tuple[Operand, ...]) -> tuple[Operand, list[Operand], list[Operand]]:
    """Return the destination, the predicates that receive carries, and the other operands."""
    destination, *rest = operands
    carries = []
    while rest[0].kind in (Kind.PREDICATE, Kind.UNIFORM_PREDICATE):
        carries.append(rest.pop(0))
    return destination, carries, rest
