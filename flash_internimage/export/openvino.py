"""Models of OpenVINO: an `.xml` file, and a `.bin` file of the same name with the weights."""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from torch.export import ExportedProgram

from . import onnx
from .formats import Runtime
from .models import Metadata

_SECTION = "model_info"


def write(program: ExportedProgram, metadata: Metadata, path: Path) -> None:
    """Write a traced model; see :class:`~.formats.FormatModule`."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "model.onnx")
        # OpenVINO does not read `DeformConv`. Its reader of programs of torch.export needs the
        # decomposed reference, whose graph is slower.
        onnx.write(program, metadata, source, form="gather")
        model = openvino.convert_model(source)
    for key, value in asdict(metadata).items():
        model.set_rt_info(json.dumps(value), [_SECTION, key])
    openvino.save_model(model, path, compress_to_fp16=False)


def load(path: Path, threads: int | None = None) -> Runtime:
    """Load a file in OpenVINO on the CPU; see :class:`~.formats.FormatModule`."""
    settings = {
        "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
        # The default is bfloat16 where the processor has it.
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = openvino.Core()
    model = core.compile_model(core.read_model(path), "CPU", settings)
    names = [output.get_any_name() for output in model.outputs]

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        outputs = model(images).values()
        return dict(zip(names, outputs, strict=True))

    return run


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a file."""
    stored: Any = openvino.Core().read_model(path).get_rt_info(_SECTION).value
    return {key: json.loads(value) for key, value in stored.items()}
