"""Decompositions of the operators into PyTorch's own, for runtimes that do not know them."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from . import reference
from .registration import DIFFERENTIABLE


def table() -> dict[torch._ops.OpOverload, Callable]:
    """Return a decomposition for every operator, forward and backward.

    The decomposed graph is functional and contains operators of PyTorch only. It gives the results
    of :mod:`ops_dcnv4.reference`, at the speed of the reference.

    Returns:
        A table for :meth:`torch.export.ExportedProgram.run_decompositions`, `aot_function` and
        `make_fx`. It has no other decompositions: combine it with
        :func:`torch.export.default_decompositions` to decompose PyTorch's operators too.

    Example::

        program = torch.export.export(model, (images,))
        program = program.run_decompositions(ops_dcnv4.decompositions.table())
    """
    names = [f"{name}{suffix}" for name in DIFFERENTIABLE for suffix in ("", "_backward")]
    return {
        getattr(torch.ops.ops_dcnv4, name).default: functools.partial(_decompose, name)
        for name in names
    }


def _decompose(name: str, *arguments: Any, deterministic: bool = False) -> Any:
    """Call the reference, which is as deterministic as PyTorch's own operators."""
    return getattr(reference, name)(*arguments)
