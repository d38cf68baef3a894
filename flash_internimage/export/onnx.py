"""ONNX files, run by onnxruntime."""

import json
import operator
import re
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from onnxscript import opset18 as op
from torch.export import ExportedProgram

from ops_dcnv4.onnx import Form, translation_table

from .formats import Runtime
from .models import Metadata

# The first one with DeformConv, which computes DCNv4: more runtimes read older opsets.
OPSET = 19
# A file of protobuf has at most 2 GB; torch.onnx writes the weights to another file from here on.
MAX_BYTES = 1536 * 2**20
_STACK_TRACE = "pkg.torch.onnx.stack_trace"


def write(
    program: ExportedProgram, metadata: Metadata, path: Path, *, form: Form = "deform_conv"
) -> None:
    """Write a traced model; see :class:`~.formats.FormatModule`.

    Args:
        program: The model.
        metadata: Metadata to store in the file.
        path: File to write.
        form: Form of DCNv4; see :func:`ops_dcnv4.onnx.translation_table`.
    """
    tensors = [*program.state_dict.values(), *program.constants.values()]
    size = sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
    if size > MAX_BYTES:
        raise ValueError(f"weights must have at most {MAX_BYTES} bytes for ONNX, got {size}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about deprecations within torch.onnx
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table={
                **translation_table(form),
                operator.floordiv: _floor_divide,
            },
            input_names=["images"],
            output_names=[*metadata.outputs],
            verbose=False,
        )
    assert exported is not None
    for node in exported.model.graph.all_nodes():
        node.metadata_props.pop(_STACK_TRACE, None)  # it contains paths of this machine
    _name_sizes(exported.model.graph)
    exported.model.metadata_props.update(
        {key: json.dumps(value) for key, value in asdict(metadata).items()}
    )
    exported.save(path)


def _name_sizes(graph: ir.Graph) -> None:
    """Name the symbols of the sizes of images, such as s14, in the shapes of all values."""
    [images] = graph.inputs
    symbols = [size.value for size in images.shape or () if isinstance(size, ir.SymbolicDim)]
    names = dict(zip(reversed(symbols), ("width", "height", "batch"), strict=False))

    def rename(size: int | ir.SymbolicDim) -> int | str | ir.SymbolicDim:
        if isinstance(size, int) or size.value is None:
            return size
        return re.sub(r"\w+", lambda word: names.get(word[0], word[0]), size.value)

    for value in (images, *(output for node in graph.all_nodes() for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([rename(size) for size in value.shape])


def _floor_divide(dividend: Any, divisor: Any) -> Any:
    """Translate the division of sizes, which torch.onnx rounds towards zero (PyTorch 2.12)."""
    return op.Div(op.Sub(dividend, op.Mod(dividend, divisor)), divisor)


def load(path: Path, threads: int | None = None) -> Runtime:
    """Load a file in onnxruntime; see :class:`~.formats.FormatModule`."""
    session = _session(path, threads)
    names = [output.name for output in session.get_outputs()]

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        outputs: Any = session.run(names, {"images": images})
        return dict(zip(names, outputs, strict=True))

    return run


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a file."""
    stored = _session(path, 1).get_modelmeta().custom_metadata_map
    return {key: json.loads(value) for key, value in stored.items()}


def _session(path: Path, threads: int | None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
