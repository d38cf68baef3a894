"""Export a model: trace, write, load again, compare and time."""

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..inference import Predictor
from .formats import find_format, trace
from .models import ExportableModel, exportable
from .precision import TOLERANCES, convert, quantize_file, quantize_program, require_precision
from .verification import (
    Comparison,
    Outputs,
    Timing,
    batches,
    check,
    check_agreement,
    compare,
    measure,
    proportion_of_equal_classes,
    run_eager,
    sample_images,
)

TOLERANCE_WITH_PREPROCESSING = 0.02


@dataclass(frozen=True)
class Report:
    """What was measured of an exported file.

    Attributes:
        path: The file.
        size: Its size in bytes, with that of the file of the weights if there is one.
        comparisons: Differences from eager PyTorch, for each batch of images.
        timings: Times with one thread and with all; empty if they were not measured.
        agreement: Proportion of the calibration images whose class is that of eager PyTorch; None
            for files that are not quantized.
    """

    path: Path
    size: int
    comparisons: Sequence[Comparison]
    timings: Sequence[Timing]
    agreement: float | None = None


def check_output(format: str, path: str | os.PathLike, task: str) -> None:
    """Check the format, its packages, the suffix of the file and the task of the model.

    Raises:
        ValueError: If there is no such format, or the suffix or task is another.
        ModuleNotFoundError: If a package of the format is missing.
    """
    chosen = find_format(format)
    path = Path(path)
    if path.suffix != chosen.suffix:
        raise ValueError(f"output must end in {chosen.suffix} for the format {format}, got {path}")
    files = [path.with_suffix(suffix) for suffix in (chosen.suffix, *chosen.other_suffixes)]
    for file in files:
        if file.is_dir():
            raise ValueError(f"output must be a file, got the folder {file}")
        if file.exists() and not path.exists():
            raise ValueError(f"output must not replace {file}, which belongs to no {path.name}")
    if task not in chosen.tasks:
        supported = " or ".join(chosen.tasks)
        raise ValueError(f"the task must be {supported} for the format {format}, got {task}")


@contextlib.contextmanager
def _one_line(problem: str) -> Iterator[None]:
    """Turn errors of exporters and runtimes, which are of many types, into a ValueError.

    An OSError remains one; if it names no file, as for a full disk, it says what failed.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(f"{problem}: {error.strerror or error}") from error
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # torch.onnx explains its steps before the cause
            cause = cause.__cause__
        lines = str(cause).strip().splitlines() or [""]
        raise ValueError(f"{problem}: {type(cause).__name__}: {lines[0]}") from error


def _size(model: ExportableModel, images: Tensor) -> str:
    height, width = (images.shape[i] for i in model.size_dims)
    return f"{height} x {width} pixels"


def _run_eager(model: ExportableModel, inputs: Sequence[Tensor]) -> list[Outputs]:
    """Return the outputs for batches of several sizes, which not all models accept."""
    expected = []
    required = "model must accept images of any size"
    if model.metadata.task == "classification":
        required += " or be exported with preprocessing"
    name = model.metadata.model or type(model.model).__name__
    for images in inputs:
        with _one_line(f"{required}, but {name} fails for {_size(model, images)}"):
            expected.append(run_eager(model, images))
    return expected


def _check_images(argument: str, images: Sequence[np.ndarray]) -> None:
    for image in images:
        if (
            not isinstance(image, np.ndarray)
            or image.dtype != np.uint8
            or image.shape[2:] != (3,)
            or not image.size
        ):
            given = type(image).__name__
            if isinstance(image, np.ndarray):
                given = f"one of {image.dtype} with the shape {image.shape}"
            raise ValueError(f"{argument} must be arrays (H, W, 3) of uint8, got {given}")


def export_model(
    predictor: Predictor,
    path: str | os.PathLike,
    format: str = "onnx",
    *,
    name: str = "",
    features: bool = False,
    with_preprocessing: bool = False,
    dtype: str = "float32",
    calibration: Sequence[np.ndarray] = (),
    images: Sequence[np.ndarray] = (),
    tolerance: float | None = None,
    timing: bool = True,
) -> Report:
    """Export a model and verify the file in its own runtime.

    The file appears only if its outputs for real images of several sizes are those of eager
    PyTorch in float32; in int8, if most calibration images have the same class.

    Args:
        predictor: Predictor in float32 on the CPU.
        path: File to write; an existing one is replaced.
        format: 'onnx', 'torch-export', 'openvino' or 'aoti'.
        name: Name of the model, for the metadata.
        features: Whether to export the feature maps of a classifier instead of its logits.
        with_preprocessing: Whether the file takes images (N, H, W, 3) uint8 RGB of any size and
            preprocesses them: classifiers only. Default: (N, 3, H, W) float32, normalized.
        dtype: Dtype in which a classifier computes: 'float32', 'float16' or 'bfloat16'.
        calibration: Arrays (H, W, 3) uint8 RGB by which a classifier is quantized to int8: not in
            OpenVINO. Default: it is not.
        images: Arrays (H, W, 3) uint8 RGB to verify with. Default: those of the calibration, or
            scikit-learn's two photographs.
        tolerance: Largest difference of an output, relative to its largest absolute value. Default:
            1e-4; 0.02 with preprocessing, as its pixels may differ from Pillow's by one level;
            0.01 for float16 and 0.05 for bfloat16. In int8, any difference is accepted.
        timing: Whether to time eager PyTorch and the file.

    Raises:
        DifferenceError: If the outputs differ by more than the tolerance.
        ModuleNotFoundError: If a package of the format, or one that quantizes, is missing.
        OSError: If the file cannot be written.
        ValueError: If the model cannot be exported to this format.

    Example::

        predictor = load_predictor("flash_internimage_tiny.in1k", device="cpu")
        report = export_model(predictor, "tiny.onnx")
    """
    if not isinstance(predictor, Predictor):
        given = type(predictor).__name__
        raise ValueError(f"predictor must be one that load_predictor returns, got {given}")
    path = Path(path)
    if dtype not in TOLERANCES:
        raise ValueError(f"dtype must be one of {', '.join(TOLERANCES)}, got {dtype!r}")
    if tolerance is None:
        tolerance = TOLERANCE_WITH_PREPROCESSING if with_preprocessing else TOLERANCES[dtype]
    if not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance must be a positive number, got {tolerance}")
    for argument, arrays in (("images", images), ("calibration", calibration)):
        _check_images(argument, arrays)
    check_output(format, path, predictor.task)
    logits = not (features or with_preprocessing)
    require_precision(format, predictor.task, dtype, len(calibration) > 0, logits)
    module = find_format(format).load_module()
    model = exportable(predictor, name, features=features, with_preprocessing=with_preprocessing)
    given = next((arrays for arrays in (images, calibration) if len(arrays)), None)
    inputs = list(batches(model, sample_images() if given is None else given))
    expected = _run_eager(model, inputs)
    traced = model if dtype == "float32" else convert(model, getattr(torch, dtype))
    examples = [model.preprocessing(image) for image in calibration]
    with _one_line(f"the model cannot be traced for {format}"):
        height, width = (inputs[0].shape[i] for i in model.size_dims)
        program = trace(traced, height, width, find_format(format).guarded)
    if examples and format != "onnx":
        with _one_line(f"the model cannot be quantized for {format}"):
            quantized = quantize_program(program, examples)
            program = trace(quantized, height, width, find_format(format).guarded)
    agreement = None
    # The file is verified in a hidden folder, as runtimes load files by their names.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        partial = Path(folder, path.name)
        with _one_line(f"the model cannot be written as {format}"):
            module.write(program, model.metadata, partial)
            if examples and format == "onnx":
                quantize_file(partial, examples)
        with _one_line(f"the runtime of {format} fails"):
            runtime = module.load(partial)
            if examples:
                agreement = proportion_of_equal_classes(model, runtime, examples)
        comparisons = []
        for batch, outputs in zip(inputs, expected, strict=True):
            with _one_line(f"the runtime of {format} fails for {_size(model, batch)}"):
                actual = runtime(batch.numpy())
            comparisons.append(compare(outputs, actual, batch.shape))
        if agreement is None:
            check(comparisons, tolerance)
        else:
            check_agreement(agreement)
        timings = []
        if timing:
            for threads in sorted({1, torch.get_num_threads()}):
                timings.append(
                    measure(model, lambda n: module.load(partial, n), inputs[0], threads)
                )
        files = sorted(Path(folder).iterdir(), key=lambda file: file == partial)
        size = sum(file.stat().st_size for file in files)
        for file in files:  # the weights first
            os.replace(file, path.with_name(file.name))
    return Report(path, size, comparisons, timings, agreement)
