"""Load, fetch and save checkpoints without executing anything in them."""

import logging
import os
import re
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import Optimizer

from ..files import write_atomically
from . import safe_load
from .downloads import download, hide_secrets

_logger = logging.getLogger(__name__)

# Options of torch's optimizers that select the implementation or the direction.
_KERNELS = ("foreach", "fused", "capturable", "differentiable", "maximize")


def load_checkpoint(
    path: str | os.PathLike,
    map_location: str | torch.device = "cpu",
) -> dict:
    """Load a checkpoint from a safetensors file or a file written by :func:`torch.save`.

    Nothing in the file is executed or imported. Objects other than tensors, numbers, strings, NumPy
    arrays and containers of these are replaced by :class:`Placeholder`, and their types
    are logged. Tensor hooks and the module versions in a state dict are dropped.

    Files must have been saved with pickle protocol 2, the default of :func:`torch.save`. Files that
    contain any of the following are rejected: sparse, quantized, nested or conjugated tensors;
    tensors with Python attributes; tensors that repeat elements of their storage
    (:meth:`torch.Tensor.expand`); arrays of anything but booleans and real numbers; complex
    numbers; bytearrays; dicts and sets with tuples as keys.

    Args:
        path: Checkpoint file.
        map_location: See :func:`torch.load`.

    Returns:
        Contents of the file.

    Raises:
        FileNotFoundError: If the file does not exist.
        OSError: If the file cannot be opened.
        ValueError: If the file is damaged or not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint not found: {path}")
    try:
        path.open("rb").close()
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error.strerror}") from error
    try:
        if path.suffix == ".safetensors":
            return load_file(path, device=str(map_location))
        checkpoint, replaced = safe_load.load(path, map_location)
    except Exception as error:  # damaged files raise errors of many types
        # torch surrounds the actual problem with advice to load the file unsafely.
        problem = str(error).rpartition("WeightsUnpickler error: ")[2].strip().split("\n\n")[0]
        if blocked := re.search(r"unsupported GLOBAL \S+ whose module \S+ is blocked", str(error)):
            problem = blocked[0]
        problem = " ".join(problem.split())  # may span several lines
        if isinstance(error, LookupError):  # The message is just a number.
            problem = "its pickle is incomplete"
        elif type(error) is not ValueError:
            problem = f"{type(error).__name__}: {problem}"
        raise ValueError(f"{path} is damaged or not a checkpoint: {problem:.500}") from error
    if not isinstance(checkpoint, dict):
        kind = type(checkpoint).__name__
        if isinstance(checkpoint, safe_load.Placeholder):
            kind = checkpoint.name
        raise ValueError(f"{path} must contain a dict, got a {kind}")
    if replaced:
        _logger.info("not restored from %s: %s", path, ", ".join(replaced))
    return checkpoint


def fetch_checkpoint(
    source: str | os.PathLike,
    offline: bool = False,
    sha256: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Path:
    """Return the local path of a checkpoint, downloading it on first use.

    Args:
        source: Path, http or https URL, or name and tag of released weights, such as
            'flash_internimage_tiny.in1k'.
        offline: Use cached files only, see :func:`download`.
        sha256: Expected SHA-256 of a downloaded file.
        cache_dir: Folder for downloads, used instead of the caches.

    Raises:
        FileNotFoundError: If `source` is not a file, a URL or the name of released weights, or
            nothing exists at the URL.
        OSError: If the download fails or is not a checkpoint.
        ValueError: If the downloaded file does not have the expected SHA-256.
    """
    source = str(source)
    # Path.is_file would raise an error for URLs longer than a file name may be.
    if os.path.isfile(source):
        return Path(source)
    released = released_classifiers()
    if source in released and (cfg := timm.get_pretrained_cfg(source)):
        source = str(cfg.url)
    elif not source.lower().startswith(("http://", "https://")):
        raise FileNotFoundError(
            f"checkpoint not found: {hide_secrets(source)} is neither a file, a URL, nor one of "
            f"{', '.join(released)}"
        )
    return download(source, offline, sha256, cache_dir)


def is_remote(source: str) -> bool:
    """Return whether a checkpoint is a URL or the name of released weights, not a path."""
    is_url = source.lower().startswith(("http://", "https://"))
    return is_url or source in released_classifiers()


def released_classifiers() -> list[str]:
    """Return the names of all released classifiers, which timm knows too."""
    return timm.list_pretrained(["flash_internimage*", "internimage*"])


def save_atomically(checkpoint: dict, path: str | os.PathLike) -> None:
    """Save a checkpoint with :func:`torch.save`, replacing an existing file atomically."""
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def check_optimizer(optimizer: Optimizer) -> None:
    """Validate a restored optimizer state and keep this run's kernel flags.

    Fused kernels do not check the shapes of the state.

    Raises:
        ValueError: If a state tensor of a fused optimizer does not have its parameter's shape.
    """
    for group in optimizer.param_groups:
        group |= {name: optimizer.defaults[name] for name in _KERNELS if name in optimizer.defaults}
        for parameter in group["params"] if group.get("fused") else []:
            for name, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape not in ((), parameter.shape):
                    raise ValueError(
                        f"optimizer state {name} must have the shape of its parameter, "
                        f"{tuple(parameter.shape)}, got {tuple(value.shape)}"
                    )
