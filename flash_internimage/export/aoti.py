"""Packages of AOTInductor: compiled for this machine, run from Python or C++."""

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from .formats import Runtime
from .models import Metadata
from .tensors import call_with_arrays


def write(program: ExportedProgram, metadata: Metadata, path: Path) -> None:
    """Compile a traced model; see :class:`~.formats.FormatModule`."""
    stored = {key: json.dumps(value) for key, value in asdict(metadata).items()}
    # Inductor computes in int8 if the weights are frozen, which it only does without gradients.
    quantized = any("quantized_decomposed" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about copies within Inductor
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(path),
            inductor_configs={"aot_inductor.metadata": stored, "freezing": quantized},
        )


def load(path: Path, threads: int | None = None) -> Runtime:
    """Load a package; see :class:`~.formats.FormatModule`."""
    names = read_metadata(path)["outputs"]
    model = torch._inductor.aoti_load_package(str(path))
    return call_with_arrays(model, names, threads)


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a package that this process has written."""
    stored: Any = torch._inductor.aoti_load_package(str(path)).loader.get_metadata()  # type: ignore[attr-defined]
    return {k: json.loads(v) for k, v in stored.items() if not k.startswith("AOTI_")}
