"""Programs of torch.export, run by PyTorch with the operators of ops_dcnv4."""

import json
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
    names = read_metadata(path)["outputs"]
    program = torch.export.load(path)  # noqa: TID251  (written by this process)
    return call_with_arrays(program.module(), names, threads)


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the metadata of a file that this process has written."""
    files: dict[str, Any] = {_METADATA: ""}
    torch.export.load(path, extra_files=files)  # noqa: TID251  (written by this process)
    return json.loads(files[_METADATA])
