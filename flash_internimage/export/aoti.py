"""Packages of AOTInductor: compiled for this machine, run from Python or C++."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch.export import ExportedProgram

from .formats import Runtime
from .models import Metadata
from .tensors import call_with_arrays


def write(program: ExportedProgram, metadata: Metadata, path: Path) -> None:
    """Compile a traced model; see :class:`~.formats.FormatModule`."""
    stored = {key: json.dumps(value) for key, value in asdict(metadata).items()}
    # Inductor computes in int8 if the weights are frozen, which it only does without gradients.
    quantized = any("quantized_decomposed" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad(), warnings.catch_warnings(), arrays_declared_at_use():
        warnings.simplefilter("ignore", UserWarning)  # about copies within Inductor
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(path),
            inductor_configs={"aot_inductor.metadata": stored, "freezing": quantized},
        )


@contextmanager
def arrays_declared_at_use() -> Iterator[None]:
    """Let Inductor declare the sizes and strides of a tensor where its C++ code uses them.

    PyTorch 2.12 caches the names of these arrays by the ``id`` of a bound method that is freed
    at once. By chance a later array has the same key, and the code names it before it is
    declared: "error: 'int_array_0' was not declared in this scope".
    """
    cached = CppWrapperCpu.codegen_int_array_var

    def declare(
        self: Any, values: str, writeline: Any, known_statically: bool = False, graph: Any = None
    ) -> str:
        return self._codegen_int_array_var_impl(values, writeline, known_statically)

    if hasattr(CppWrapperCpu, "_codegen_int_array_var_impl"):
        CppWrapperCpu.codegen_int_array_var = declare  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        CppWrapperCpu.codegen_int_array_var = cached  # type: ignore[method-assign]


def load(path: Path, threads: int | None = None) -> Runtime:
    """Load a package; see :class:`~.formats.FormatModule`."""
    names = read_metadata(path)["outputs"]
    model = torch._inductor.aoti_load_package(str(path))
    return call_with_arrays(model, names, threads)


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a package that this process has written."""
    stored: Any = torch._inductor.aoti_load_package(str(path)).loader.get_metadata()  # type: ignore[attr-defined]
    return {k: json.loads(v) for k, v in stored.items() if not k.startswith("AOTI_")}
