"""Classifiers in other precisions than float32: 16 bits, and int8 by onnxruntime or torchao."""

import contextlib
import copy
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from .formats import require_packages
from .models import ExportableClassifier, ExportableModel

# Largest differences from eager PyTorch in float32, relative to the largest value of an output.
TOLERANCES = {"float32": 1e-4, "float16": 0.01, "bfloat16": 0.05}
# Convolutions of ONNX have no bfloat16 before opset 22, and OpenVINO computes float16 in float32.
_FORMATS = {
    "float16": ("onnx", "torch-export", "aoti"),
    "bfloat16": ("torch-export", "aoti"),
    "int8": ("onnx", "torch-export", "aoti"),
}
# Operators of ONNX that are computed in int8: DeformConv and the norms remain in float32.
_QUANTIZED = ["Conv", "Gemm", "MatMul"]


def require_precision(format: str, task: str, dtype: str, int8: bool, logits: bool) -> None:
    """Check that a model can be exported in a precision.

    Args:
        format: Name of the format.
        task: Task of the model.
        dtype: Dtype of the weights, one of `TOLERANCES`.
        int8: Whether the model will be quantized.
        logits: Whether its output are logits for normalized images.

    Raises:
        ModuleNotFoundError: If a package that quantizes is missing.
        ValueError: If it cannot.
    """
    if not int8 and dtype == "float32":
        return
    precision = "int8" if int8 else dtype
    if task != "classification":
        raise ValueError(f"the task must be classification for {precision}, got {task}")
    if not logits:
        raise ValueError(
            f"{precision} must be without features and preprocessing in the graph, got one of them"
        )
    if int8 and dtype != "float32":
        raise ValueError(f"dtype must be float32 for int8, got {dtype}")
    if format not in _FORMATS[precision]:
        formats = " or ".join(_FORMATS[precision])
        raise ValueError(f"the format must be {formats} for {precision}, got {format}")
    if int8 and format != "onnx":
        require_packages("torchao")


class _InDtype(nn.Module):
    """A model that computes in a dtype, from and to float32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images.to(self.dtype)).float()


def convert(model: ExportableModel, dtype: torch.dtype) -> ExportableModel:
    """Return a copy of a classifier that computes in a dtype; input and output are float32."""
    converted = copy.deepcopy(model)
    converted.model = _InDtype(converted.model, dtype)
    return converted


def quantize_file(path: Path, images: Iterable[Tensor]) -> None:
    """Quantize an ONNX file in place: static ranges, QuantizeLinear and DequantizeLinear nodes.

    Args:
        path: The file.
        images: Inputs (1, 3, H, W) float32 from which the ranges of the activations are found.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    with _without_warnings():  # it recommends a preparation that changes nothing here
        quantize_static(
            path,
            path,
            _Reader(images),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            op_types_to_quantize=_QUANTIZED,
        )
    quantized: Any = onnx.load(path)
    onnx.helper.set_model_props(quantized, metadata)
    onnx.save(quantized, path)


class _Reader:
    """Images in the form that onnxruntime reads them."""

    def __init__(self, images: Iterable[Tensor]) -> None:
        self.images: Iterator[Tensor] = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.images, None)
        return None if image is None else {"images": image.numpy()}


class _QuantizedClassifier(ExportableClassifier):
    """A classifier whose model is a graph with the same outputs."""

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.model(images)


def quantize_program(program: ExportedProgram, images: Iterable[Tensor]) -> ExportableModel:
    """Return a traced classifier with static ranges, to be traced again.

    The layers remain in float32 between operators that quantize and dequantize, which Inductor
    replaces by layers in int8.

    Args:
        program: The traced classifier; it is not modified.
        images: Inputs (1, 3, H, W) float32 from which the ranges of the activations are found.
    """
    with _without_warnings():  # about deprecations within torchao
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
            X86InductorQuantizer,
            get_default_x86_inductor_quantization_config,
        )

    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config())
    observed = prepare_pt2e(program.module(check_guards=False), quantizer)
    with torch.no_grad():
        for image in images:
            observed(image)
    return _QuantizedClassifier(convert_pt2e(observed))


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Log no warnings within a block."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
