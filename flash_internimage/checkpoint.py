"""Reading checkpoints without executing anything from the file, and writing them atomically."""

import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

_WEIGHTS = ("state_dict", "model_ema", "model")
_PREFIXES = ("module.", "backbone.")


def clean_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint under the names of the model.

    Takes the entry `state_dict`, else `model_ema`, else `model`, as the published code does, and
    strips the prefixes of wrappers.
    """
    for key in _WEIGHTS:
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    return {_strip(name): tensor for name, tensor in checkpoint.items()}


def _strip(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def load_checkpoint(path: str | os.PathLike, map_location: str | torch.device = "cpu") -> dict:
    """The contents of a checkpoint file: safetensors, or a pickle of tensors and plain containers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds objects that only executing it could restore.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint not found: {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path, device=str(map_location))
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except UnpicklingError as error:
        raise ValueError(
            f"{path} is refused: it holds more than tensors and plain containers, and nothing from "
            f"a checkpoint is executed ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}, expected a dict")
    return checkpoint


def save_atomically(checkpoint: dict, path: str | os.PathLike) -> None:
    """Writes `path` so that at any moment it is the old file or the new one, whole."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
