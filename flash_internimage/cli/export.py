"""Export a model, and verify the file in its own runtime.

flash-internimage export NAME|CONFIG [CHECKPOINT] --format onnx|torch-export|openvino|aoti -o OUT
"""

import argparse
import logging
import math
import os
import sys
from pathlib import Path

import huggingface_hub
import numpy as np

from ..console import log_to_terminal
from ..export import FORMATS, DifferenceError, Report, export_model
from ..export.exporting import check_output
from ..export.models import check_options
from ..export.precision import TOLERANCES, require_precision
from ..files import writable_folder
from ..inference.predictor import find_model, load_predictor
from ..inference.sources import Source, find_sources, read_rgb

_logger = logging.getLogger(__name__)

PROGRAM = "flash-internimage export"
_MAX_IMAGES, _MAX_CALIBRATION = 8, 256


def parse_arguments(argv: list[str] | None, program: str = PROGRAM) -> argparse.Namespace:
    """Parse the command line.

    Args:
        argv: Arguments; None for those of the process.
        program: Name of the program in usage messages.
    """
    parser = argparse.ArgumentParser(
        program, description="Export a model, and compare the file with eager PyTorch."
    )
    parser.add_argument("model", metavar="NAME|CONFIG",
                        help="model of the zoo or of timm, or a config of any task")  # fmt: skip
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?",
                        help="weights (default: the released ones)")  # fmt: skip
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT",
                        help="file to write: *.onnx, *.xml (openvino) or *.pt2")  # fmt: skip
    parser.add_argument("--features", action="store_true",
                        help="export the feature maps of a classifier, not its logits")  # fmt: skip
    parser.add_argument("--with-preprocessing", action="store_true",
                        help="take uint8 images of any size: classifiers only")  # fmt: skip
    parser.add_argument("--dtype", choices=TOLERANCES, default="float32",
                        help="weights and computation of a classifier (default: %(default)s); "
                        "input and output remain float32")  # fmt: skip
    parser.add_argument("--int8", action="store_true",
                        help="quantize a classifier to int8: not in OpenVINO")  # fmt: skip
    parser.add_argument("--calibration", nargs="+", default=[], metavar="IMAGE",
                        help="images or folders that calibrate --int8 (at most "
                        f"{_MAX_CALIBRATION} images are used)")  # fmt: skip
    parser.add_argument("--images", nargs="+", default=[], metavar="IMAGE",
                        help="images or folders for the comparison, at most "
                        f"{_MAX_IMAGES} images (default: those of --calibration, or "
                        "scikit-learn's two photographs)")  # fmt: skip
    parser.add_argument("--tolerance", type=float, metavar="X",
                        help="largest difference from eager PyTorch, relative to the largest "
                        f"value of an output (default: {TOLERANCES['float32']:g}; more for "
                        "16-bit dtypes and preprocessing)")  # fmt: skip
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None, program: str = PROGRAM) -> int:
    """Run the command and return the exit code."""
    log_to_terminal()
    huggingface_hub.utils.logging.disable_propagation()  # it has its own handler
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # it logs every request
    for name in ("onnx_ir", "onnxscript"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they log every step
    arguments = parse_arguments(argv, program)
    try:
        report = _run(arguments)
    except DifferenceError as error:
        _logger.error("no file is written: %s", error)
        return 1
    except (ValueError, OSError) as error:
        _logger.error("%s", " ".join(str(error).split()))
        return 2
    sys.stdout.write(_describe(report))
    return 0


def _run(arguments: argparse.Namespace) -> Report:
    arguments.output = arguments.output.expanduser()
    if arguments.tolerance is not None and not 0 < arguments.tolerance < math.inf:
        raise ValueError(f"--tolerance must be a positive number, got {arguments.tolerance}")
    if arguments.int8 != bool(arguments.calibration):
        raise ValueError("--int8 and --calibration must be given together, got one of them")
    if arguments.int8 and arguments.tolerance is not None:
        raise ValueError("--tolerance must not be given with --int8, which accepts any difference")
    checkpoint = arguments.checkpoint and os.path.expanduser(arguments.checkpoint)
    if checkpoint and Path(checkpoint).resolve() == arguments.output.resolve():
        raise ValueError(f"-o must be another file than CHECKPOINT, got {checkpoint} for both")
    source = find_model(arguments.model)
    check_options(source.task, arguments.features, arguments.with_preprocessing)
    check_output(arguments.format, arguments.output, source.task)
    logits = not (arguments.features or arguments.with_preprocessing)
    require_precision(arguments.format, source.task, arguments.dtype, arguments.int8, logits)
    images = _find(arguments.images, "--images", _MAX_IMAGES)
    calibration = _find(arguments.calibration, "--calibration", _MAX_CALIBRATION)
    with writable_folder(arguments.output.parent, "-o"):
        return export_model(
            load_predictor(source, checkpoint, device="cpu"),
            arguments.output,
            arguments.format,
            name=source.name,
            features=arguments.features,
            with_preprocessing=arguments.with_preprocessing,
            dtype=arguments.dtype,
            calibration=_read(calibration),
            images=_read(images),
            tolerance=arguments.tolerance,
        )


def _find(inputs: list[str], argument: str, limit: int) -> list[Source]:
    """Return at most `limit` images, evenly spaced, as folders may contain one class each."""
    try:
        sources = find_sources(inputs) if inputs else []
    except (ValueError, OSError) as error:
        raise ValueError(str(error).replace("INPUT", argument)) from error
    if other := next((source for source in sources if source.kind != "image"), None):
        raise ValueError(f"{argument} must be images or folders, got the {other.kind} {other.path}")
    if len(sources) <= limit:
        return sources
    _logger.info("%d of %d images of %s are used", limit, len(sources), argument)
    return [sources[i * len(sources) // limit] for i in range(limit)]


def _read(sources: list[Source]) -> list[np.ndarray]:
    return [read_rgb(source.path) for source in sources]  # type: ignore[arg-type]


def _describe(report: Report) -> str:
    """Return a table of the differences, and the times, as text."""
    lines = [f"{report.path}: {report.size / 1e6:.1f} MB"]
    lines.append("images                 output    largest   mean      agreement")
    for comparison in report.comparisons:
        shape = " x ".join(map(str, comparison.shape))
        agreement = "-" if comparison.agreement is None else f"{comparison.agreement:.2%}"
        for name, largest in comparison.largest.items():
            mean = comparison.mean[name]
            lines.append(f"{shape:22} {name:9} {largest:<9.1e} {mean:<9.1e} {agreement}")
    if report.agreement is not None:
        lines.append(f"calibration images: {report.agreement:.2%} have the same class")
        lines.append("Differences of int8 files are not checked.")
    for timing in report.timings:
        threads = "1 thread" if timing.threads == 1 else f"{timing.threads} threads"
        eager, exported = 1e3 * timing.eager, 1e3 * timing.exported
        lines.append(
            f"{threads}: eager {eager:.1f} ms, exported {exported:.1f} ms, "
            f"ratio {eager / exported:.2f}"
        )
    return "\n".join(lines) + "\n"
