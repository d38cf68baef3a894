"""Conversion of mmengine's checkpoints to tensors, numbers, text and containers, and back."""

from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from torch import Tensor

from ....checkpoints import Placeholder

_HISTORY = "mmengine.logging.history_buffer.HistoryBuffer"
_FIELDS = ("_log_history", "_count_history", "max_length")


def make_plain(checkpoint: dict) -> None:
    """Replace log histories and NumPy scalars, so that `torch.load` needs no special settings.

    Arrays are kept, because hooks that store them in the message hub expect arrays on resume.

    Args:
        checkpoint: Checkpoint that mmengine is about to save. Changed in place.
    """
    for name in ("meta", "message_hub", "optimizer", "param_schedulers"):
        if name in checkpoint:
            checkpoint[name] = _plain(checkpoint[name])


def _plain(value: Any) -> Any:
    if isinstance(value, HistoryBuffer):
        logs, counts = map(torch.from_numpy, value.data)
        return dict(zip(_FIELDS, (logs, counts, value.max_length), strict=True))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def restore_histories(checkpoint: dict, source: object) -> None:
    """Restore the log histories of a checkpoint, as mmengine needs them to resume.

    Args:
        checkpoint: Loaded checkpoint, written with :func:`make_plain` or by mmengine alone. Changed
            in place.
        source: Name of the checkpoint in error messages.

    Raises:
        ValueError: If a history is malformed.
    """
    hub = checkpoint.get("message_hub")
    scalars = hub.get("log_scalars") if isinstance(hub, dict) else None
    if not isinstance(scalars, dict):
        return
    for name, value in scalars.items():
        if isinstance(value, Placeholder) and value.name == _HISTORY:
            scalars[name] = _restore(value.state, f"{source}: log_scalars.{name}")
        elif isinstance(value, dict):
            scalars[name] = _restore(value, f"{source}: log_scalars.{name}")


def _restore(state: Any, name: str) -> HistoryBuffer:
    logs, counts, length = map(state.get if isinstance(state, dict) else {}.get, _FIELDS)
    if isinstance(logs, Tensor) and isinstance(counts, Tensor):
        logs, counts = (tensor.detach().cpu().double().numpy() for tensor in (logs, counts))
    if not (
        isinstance(logs, np.ndarray)
        and isinstance(counts, np.ndarray)
        and (logs.ndim, counts.shape) == (1, logs.shape)
        and {logs.dtype.kind, counts.dtype.kind} <= set("iuf")
        and type(length) is int
        and length >= max(1, len(logs))
    ):
        raise ValueError(f"{name} must be two arrays of numbers of one length, got {state!r:.200}")
    return HistoryBuffer(logs, counts, length)
