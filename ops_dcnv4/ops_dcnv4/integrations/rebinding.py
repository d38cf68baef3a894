"""Copies of functions that read other objects from their global names."""

from collections.abc import Callable, Iterator, Mapping
from types import CellType, CodeType, FunctionType
from typing import Any


def rebind(function: Callable, replacements: Mapping[str, Any]) -> Callable | None:
    """Return a copy of a function in which some global names refer to other objects.

    The library that defines the function is not changed. A function in a decorator made with
    :func:`functools.wraps` is copied together with the decorator.

    Args:
        function: Function to copy.
        replacements: Objects by global name.

    Returns:
        The copy, or None if the function uses none of the names.
    """
    if not isinstance(function, FunctionType):
        return None
    names = set(_names(function.__code__))
    wrapped = getattr(function, "__wrapped__", None)
    inner = None if wrapped is None else rebind(wrapped, replacements)
    if inner is None and not names & replacements.keys():
        return None
    closure = function.__closure__
    if inner is not None and closure is not None:
        closure = tuple(
            CellType(inner) if cell.cell_contents is wrapped else cell for cell in closure
        )
    # Without "__name__", torch.compile looks names up here rather than in the library's module.
    used = {name: o for name, o in function.__globals__.items() if name in names}
    scope = {"__builtins__": function.__globals__["__builtins__"]} | used
    scope |= {name: o for name, o in replacements.items() if name in names}
    copy = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, closure)
    copy.__dict__.update(function.__dict__)
    if inner is not None:
        copy.__wrapped__ = inner  # type: ignore[attr-defined]
    for attribute in ("__kwdefaults__", "__annotations__", "__module__", "__qualname__", "__doc__"):
        setattr(copy, attribute, getattr(function, attribute))
    return copy


def _names(code: CodeType) -> Iterator[str]:
    """Return the names that a function and the functions in it use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
