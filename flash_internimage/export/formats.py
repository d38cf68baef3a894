"""The formats: their names, suffixes and packages, and the tracing that they share."""

import importlib
import operator
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast
from unittest import mock

import numpy as np
import torch
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.experimental import _config
from torch.utils._sympy.value_ranges import ValueRanges

from .models import ExportableModel, Metadata

# Twice the largest stride of a feature map, of the necks of the detectors.
_MIN_TRACED_SIDE = 128
_EXCLUDES_ONE = re.compile(r".+ (!=|>) 1|1 < .+")

# Runs an exported file: images to outputs by name.
Runtime = Callable[[np.ndarray], dict[str, np.ndarray]]


class FormatModule(Protocol):
    """What the module of a format contains."""

    def write(self, program: ExportedProgram, metadata: Metadata, path: Path) -> None:
        """Write a traced model to a file, and weights in another file to its folder."""

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
        packages: Packages that it needs, of the extra `export` or `openvino`.
        tasks: Tasks of the models that it supports.
        guarded: Whether its files contain the guards under which a trace is valid.
        other_suffixes: Suffixes of further files of the same name.
    """

    module: str
    suffix: str
    packages: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ("classification", "detection", "segmentation")
    guarded: bool = False
    other_suffixes: tuple[str, ...] = ()

    def load_module(self) -> FormatModule:
        """Return the module of the format."""
        return cast(FormatModule, importlib.import_module(f".{self.module}", __package__))


FORMATS = {
    "onnx": Format("onnx", ".onnx", ("onnx", "onnxscript", "onnxruntime")),
    "torch-export": Format("torch_export", ".pt2", guarded=True),
    "openvino": Format(
        "openvino",
        ".xml",
        ("openvino", "onnx", "onnxscript", "onnxruntime"),
        tasks=("classification", "segmentation"),
        other_suffixes=(".bin",),
    ),
    "aoti": Format("aoti", ".pt2", tasks=("classification", "segmentation"), guarded=True),
}


def find_format(name: str) -> Format:
    """Return a format whose packages are installed.

    Raises:
        ValueError: If there is no such format.
        ModuleNotFoundError: If a package is missing.
    """
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    require_packages(*FORMATS[name].packages)
    return FORMATS[name]


def require_packages(*packages: str) -> None:
    """Check that packages are installed.

    Raises:
        ModuleNotFoundError: If one is missing.
    """
    for package in packages:
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)


def trace(model: ExportableModel, height: int, width: int, guarded: bool = True) -> ExportedProgram:
    """Trace a model for any number and size of images.

    Args:
        model: Model to trace.
        height: Height of the example.
        width: Width of the example.
        guarded: Whether the format contains the guards. If not, tracing may assume that no size is
            one; torch.onnx cannot decompose detectors otherwise.
    """
    sizes = dict.fromkeys(model.size_dims, Dim.DYNAMIC)
    if model.dynamic_batch:
        sizes[0] = Dim.DYNAMIC
    # No feature map of the example has a side of one pixel, which would be taken for a constant.
    example = model.example(max(height, _MIN_TRACED_SIDE), max(width, _MIN_TRACED_SIDE))
    with (
        torch.no_grad(),
        warnings.catch_warnings(),
        _config.patch(backed_size_oblivious=guarded),  # type: ignore[attr-defined]
        # This division compares the remainder with zero, to no effect on a quotient of Python: the
        # guards would fix which sizes are odd in models with pooling.
        mock.patch.object(torch._meta_registrations, "div_rtn", operator.floordiv),
    ):
        warnings.simplefilter("ignore", FutureWarning)  # within torchvision's NMS
        program = torch.export.export(model, (example,), dynamic_shapes=(sizes,))
    _allow_sizes_of_one(program)
    _drop_unused_weights(program)
    return program


def _allow_sizes_of_one(program: ExportedProgram) -> None:
    """Drop the guards that exclude sizes of one.

    The strides of a tensor determine the memory format of a convolution. To compare them, tracing
    assumes that no image or feature map has a side of one pixel, nor a batch one image. Memory
    formats do not change results.
    """
    guards = program._guards_code
    guards[:] = [guard for guard in guards if not _EXCLUDES_ONE.fullmatch(guard)]
    for symbol, sizes in program.range_constraints.items():
        if str(symbol).startswith("s"):  # of the images; results have symbols with a "u"
            program.range_constraints[symbol] = ValueRanges(1, sizes.upper)


def _drop_unused_weights(program: ExportedProgram) -> None:
    """Drop the weights that nothing reads: those of the original beside a traced copy of it."""
    inputs = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    specs = program.graph_signature.input_specs
    for spec in [*specs]:
        node = inputs[spec.arg.name]
        if spec.kind != InputKind.USER_INPUT and not node.users:
            program.graph.erase_node(node)
            specs.remove(spec)
            for weights in (program.state_dict, program.constants):
                weights.pop(str(spec.target), None)
    program.graph_module.recompile()
