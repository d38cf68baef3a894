"""The formats: their names, suffixes and packages, and the tracing that they share."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch.export import Dim, ExportedProgram

from .models import ExportableModel, Metadata

# Runs an exported file: images to outputs by name.
Runtime = Callable[[np.ndarray], dict[str, np.ndarray]]


class FormatModule(Protocol):
    """What the module of a format contains."""

    def write(self, program: ExportedProgram, metadata: Metadata, path: Path) -> None:
        """Write a traced model to a file."""

    def load(self, path: Path, threads: int | None = None) -> Runtime:
        """Load a file with the runtime of the format.

        Args:
            path: File to load.
            threads: Number of threads; None for that of PyTorch.
        """

    def read_metadata(self, path: Path) -> dict[str, Any]:
        """Return the metadata of a file."""


@dataclass(frozen=True)
class Format:
    """A format of exported models.

    Attributes:
        module: Name of its module in this package.
        suffix: Suffix of its files.
        packages: Packages of the extra `export` that it needs.
        tasks: Tasks of the models that it supports.
    """

    module: str
    suffix: str
    packages: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ("classification", "detection", "segmentation")

    def load_module(self) -> FormatModule:
        """Return the module of the format."""
        return cast(FormatModule, importlib.import_module(f".{self.module}", __package__))


FORMATS = {
    "onnx": Format("onnx", ".onnx", ("onnx", "onnxscript", "onnxruntime")),
    "torch-export": Format("torch_export", ".pt2"),
    "aoti": Format("aoti", ".pt2", tasks=("classification",)),
}


def find_format(name: str) -> Format:
    """Return a format whose packages are installed.

    Raises:
        ValueError: If there is no such format.
        ModuleNotFoundError: If a package is missing.
    """
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    for package in FORMATS[name].packages:
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    return FORMATS[name]


def trace(model: ExportableModel, height: int, width: int) -> ExportedProgram:
    """Trace a model for any number and size of images.

    Args:
        model: Model to trace.
        height: Height of the example.
        width: Width of the example.
    """
    sizes = dict.fromkeys(model.size_dims, Dim.DYNAMIC)
    if model.dynamic_batch:
        sizes[0] = Dim.DYNAMIC
    example = model.example(height, width)
    with torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes=(sizes,))
