"""Programs of torch.export, run by PyTorch with the operators of ops_dcnv4."""

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

_METADATA = "metadata.json"


def write(program: ExportedProgram, metadata: Metadata, path: Path) -> None:
    """Write a traced model; see :class:`~.formats.FormatModule`."""
    torch.export.save(program, path, extra_files={_METADATA: json.dumps(asdict(metadata))})


def load(path: Path, threads: int | None = None) -> Runtime:
    """Load a file in PyTorch; see :class:`~.formats.FormatModule`."""
    program, metadata = _read(path)
    return call_with_arrays(program.module(), metadata["outputs"], threads)


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a file that this process has written."""
    return _read(path)[1]


def _read(path: Path) -> tuple[ExportedProgram, dict[str, Any]]:
    files: dict[str, Any] = {_METADATA: ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that its buffers are not writable
        program = torch.export.load(path, extra_files=files)  # noqa: TID251  (written by this process)
    return program, json.loads(files[_METADATA])
