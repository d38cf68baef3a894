"""Export a model: trace, write, load again, compare and time."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..inference import Predictor
from .formats import find_format, trace
from .models import exportable
from .verification import (
    Comparison,
    Timing,
    batches,
    check,
    compare,
    measure,
    sample_images,
)

TOLERANCE, TOLERANCE_WITH_PREPROCESSING = 1e-4, 0.02


@dataclass(frozen=True)
class Report:
    """What was measured of an exported file.

    Attributes:
        path: The file.
        size: Its size in bytes, with that of the file of the weights if there is one.
        comparisons: Differences from eager PyTorch, for each batch of images.
        timings: Times with one thread and with all; empty if they were not measured.
    """

    path: Path
    size: int
    comparisons: Sequence[Comparison]
    timings: Sequence[Timing]


def check_output(format: str, path: str | os.PathLike, task: str) -> None:
    """Check the format, its packages, the suffix of the file and the task of the model.

    Raises:
        ValueError: If there is no such format, or the suffix or task is another.
        ModuleNotFoundError: If a package of the format is missing.
    """
    chosen = find_format(format)
    if Path(path).suffix != chosen.suffix:
        raise ValueError(f"output must end in {chosen.suffix} for the format {format}, got {path}")
    if task not in chosen.tasks:
        supported = " or ".join(chosen.tasks)
        raise ValueError(f"the task must be {supported} for the format {format}, got {task}")


@contextlib.contextmanager
def _one_line(problem: str) -> Iterator[None]:
    """Turn errors of exporters and runtimes, which are of many types, into a ValueError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise ValueError(f"{problem}: {type(error).__name__}: {lines[0]}") from error


def export_model(
    predictor: Predictor,
    path: str | os.PathLike,
    format: str = "onnx",
    *,
    name: str = "",
    features: bool = False,
    with_preprocessing: bool = False,
    images: Sequence[np.ndarray] = (),
    tolerance: float | None = None,
    timing: bool = True,
) -> Report:
    """Export a model and verify the file in its own runtime.

    The file appears only if its outputs for real images of several sizes are those of eager
    PyTorch.

    Args:
        predictor: Predictor in float32 on the CPU.
        path: File to write; an existing one is replaced.
        format: 'onnx', 'torch-export', 'openvino' or 'aoti'.
        name: Name of the model, for the metadata.
        features: Whether to export the feature maps of a classifier instead of its logits.
        with_preprocessing: Whether the file takes images (N, H, W, 3) uint8 RGB of any size and
            preprocesses them: classifiers only. Default: (N, 3, H, W) float32, normalized.
        images: Arrays (H, W, 3) uint8 RGB to verify with. Default: scikit-learn's two photographs.
        tolerance: Largest difference of an output, relative to its largest absolute value. Default:
            1e-4, or 0.02 with preprocessing, as its pixels may differ from Pillow's by one level.
        timing: Whether to time eager PyTorch and the file.

    Raises:
        DifferenceError: If the outputs differ by more than the tolerance.
        ModuleNotFoundError: If a package of the format is missing.
        OSError: If the file cannot be written.
        ValueError: If the model cannot be exported to this format.

    Example::

        predictor = load_predictor("flash_internimage_tiny.in1k", device="cpu")
        report = export_model(predictor, "tiny.onnx")
    """
    path = Path(path)
    if tolerance is None:
        tolerance = TOLERANCE_WITH_PREPROCESSING if with_preprocessing else TOLERANCE
    check_output(format, path, predictor.task)
    module = find_format(format).load_module()
    model = exportable(predictor, name, features=features, with_preprocessing=with_preprocessing)
    inputs = list(batches(model, images or sample_images()))
    with _one_line(f"the model cannot be traced for {format}"):
        program = trace(model, *(inputs[0].shape[i] for i in model.size_dims))
    # The file is verified in a hidden folder, as runtimes load files by their names.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        partial = Path(folder, path.name)
        with _one_line(f"the model cannot be written as {format}"):
            module.write(program, model.metadata, partial)
        with _one_line(f"the runtime of {format} fails"):
            runtime = module.load(partial)
            comparisons = [compare(model, runtime, batch) for batch in inputs]
        check(comparisons, tolerance)
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
    return Report(path, size, comparisons, timings)
