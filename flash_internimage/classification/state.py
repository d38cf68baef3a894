"""State that a training run saves and restores: totals, random numbers, settings, optimizer."""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.optim import Optimizer

from ..checkpoint import check_optimizer

# Entries of last.pth, except `model_ema`, which requires an EMA.
_ENTRIES = (
    "model", "optimizer", "scaler", "epoch", "update", "updates_per_epoch", "totals", "best_top1",
    "nonfinite_in_a_row", "rng", "classes", "config",
)  # fmt: skip

_KINDS = {"optimizer": dict, "scaler": dict, "rng": list, "classes": list, "config": dict}

# Settings that cannot change on resuming, as weights and optimizer state would not fit.
_FIXED = (
    "model.name", "model.num_classes", "model.initial_checkpoint", "model.class_map",
    "optimizer.name",
)  # fmt: skip

# Settings that determine which images of an epoch remain.
_FIXED_WITHIN_EPOCH = ("seed", "batch_size", "accumulation_steps")

# Settings that must be equal for the accuracies of two epochs to be comparable.
_OF_VALIDATION = (
    "data.val_split", "data.image_size", "data.crop_pct", "data.interpolation", "data.mean",
    "data.std",
)  # fmt: skip

# Some optimizers count steps in their parameter groups. All other entries there are settings.
_STEP = "step"


class Totals(NamedTuple):
    """Running totals of the current epoch.

    Attributes:
        loss: Sum of the finite losses.
        finite: Number of updates with a finite loss.
        skipped: Number of updates without a finite loss, which were skipped.
        seconds: Total time of the updates.
    """

    loss: float = 0.0
    finite: int = 0
    skipped: int = 0
    seconds: float = 0.0

    def plus(self, loss: float, seconds: float) -> "Totals":
        """Return the totals after another update."""
        if not math.isfinite(loss):
            return self._replace(skipped=self.skipped + 1, seconds=self.seconds + seconds)
        return Totals(self.loss + loss, self.finite + 1, self.skipped, self.seconds + seconds)


# --- random numbers ----------------------------------------------------------------------------


def seed_everything(*numbers: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch from one or more numbers."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state() -> dict:
    """Return the state of all random number generators in types that a checkpoint may contain."""
    name, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict) -> None:
    """Restore all random number generators from a result of :func:`rng_state`.

    Raises:
        ValueError: If NumPy's state would make it read out of bounds.
    """
    _, keys, position, *_ = state["numpy"]
    if len(keys) != 624 or not 0 <= position <= 624:  # NumPy does not check its bounds
        raise ValueError(f"numpy's random state has {len(keys)} keys and position {position}")
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


# --- entries and settings -------------------------------------------------------------------------


def check_entries(checkpoint: Mapping[str, Any]) -> None:
    """Check that a checkpoint has all entries of a training run.

    Raises:
        ValueError: If entries are missing, as in a file with only weights, or of another type.
    """
    missing = [name for name in _ENTRIES if name not in checkpoint]
    if missing:
        raise ValueError(
            f"it must hold the state of a run of classification.train, it lacks "
            f"{', '.join(missing)}"
        )
    for name, kind in _KINDS.items():
        if not isinstance(checkpoint[name], kind):
            raise ValueError(f"{name} must be a {kind.__name__}, got {checkpoint[name]!r:.100}")
    if not checkpoint["rng"] or not all(isinstance(one, dict) for one in checkpoint["rng"]):
        raise ValueError(f"rng must hold a dict per process, got {checkpoint['rng']!r:.100}")
    settings = flatten(checkpoint["config"])
    if missing := [key for key in _FIXED if key not in settings]:
        raise ValueError(f"config must hold the settings of the run, it lacks {missing[0]}")


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested sections into one level of dotted keys."""
    flat = {}
    for key, value in config.items():
        is_section = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{key}.") if is_section else {prefix + key: value}
    return flat


def check_settings(before: Mapping[str, Any], now: Mapping[str, Any], within_epoch: bool) -> None:
    """Check that a resumed run does not change fixed settings.

    Args:
        before: Flattened settings of the checkpoint.
        now: Flattened settings of this run.
        within_epoch: Whether the checkpoint was saved within an epoch.

    Raises:
        ValueError: If such a setting differs; the message names the first one.
    """
    for key in _FIXED:
        if key == "optimizer.name" and str(before.get(key)).lower() == str(now[key]).lower():
            continue  # timm's names are case-insensitive
        # Resuming does not load initial weights, so removing this setting changes nothing.
        if now[key] is not None and before.get(key, now[key]) != now[key]:
            raise ValueError(
                f"{key} must be {before[key]!r} as in the checkpoint, got {now[key]!r}; a new run "
                "with model.initial_checkpoint starts from its weights"
            )
    for key in _FIXED_WITHIN_EPOCH if within_epoch else ():
        if before.get(key, now[key]) != now[key]:
            raise ValueError(
                f"{key} must be {before[key]!r} as in the checkpoint, which was saved within an "
                f"epoch, got {now[key]!r}"
            )


def validates_alike(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether accuracies measured with two sets of settings are comparable."""
    return all(before.get(key, now[key]) == now[key] for key in _OF_VALIDATION)


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for every setting that differs or exists on only one side."""
    return [
        f"{key} was {before.get(key)}, is now {now.get(key)}"
        for key in {**now, **before}
        if before.get(key) != now.get(key)
    ]


def describe_other_classes(checkpoint: Sequence[str], data: Sequence[str]) -> str | None:
    """Return how the classes of a checkpoint and a data set differ, or None if they are equal.

    Args:
        checkpoint: Class names of the checkpoint, in the order of its outputs.
        data: Class names of the data set, in the order of its labels.
    """
    checkpoint, data = list(checkpoint), list(data)
    if checkpoint == data:
        return None
    sides = {
        "only in the checkpoint": [name for name in checkpoint if name not in set(data)],
        "only in the data": [name for name in data if name not in set(checkpoint)],
    }
    parts = [
        f"{side}: {', '.join(map(str, names[:5]))}{', ...' if len(names) > 5 else ''}"
        for side, names in sides.items()
        if names
    ]
    if not parts:
        parts = [
            f"class {i} is {old} in the checkpoint and {new} in the data"
            for i, (old, new) in enumerate(zip(checkpoint, data, strict=False))
            if old != new
        ][:1]
    return "; ".join(parts) or f"{len(checkpoint)} in the checkpoint and {len(data)} in the data"


# --- optimizer and weights ---------------------------------------------------------------------


def _first_entries(optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """Return the state that the first step of an optimizer creates, by parameter name.

    The step is undone: parameters, settings and the empty state are restored.
    """
    groups = optimizer.param_groups
    settings = [dict(group) for group in groups]
    parameters = {n: p for g in groups for n, p in zip(g["names"], g["params"], strict=True)}
    before = [parameter.detach().clone() for parameter in parameters.values()]
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for parameter, values in zip(parameters.values(), before, strict=True):
            parameter.copy_(values)
    entries = {name: optimizer.state[parameter] for name, parameter in parameters.items()}
    optimizer.state.clear()
    for group, values in zip(groups, settings, strict=True):
        group.clear()
        group.update(values)
    return entries


def _check_entry(entry: Any, expected: Mapping[str, Any], name: str) -> None:
    if not isinstance(entry, dict) or entry.keys() != expected.keys():
        found = ", ".join(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
        raise ValueError(
            f"the optimizer's state of {name} must be {', '.join(expected)}, got {found:.200}"
        )
    for key, value in entry.items():
        found, right = _describe_value(value), _describe_value(expected[key])
        if found != right:
            raise ValueError(f"{key} of the optimizer must be {right} for {name}, got {found}")


def _describe_value(value: Any) -> str:
    if isinstance(value, torch.Tensor) and value.ndim:
        return f"of shape {tuple(value.shape)}"
    is_number = isinstance(value, (torch.Tensor, int, float))
    return "a number" if is_number else type(value).__name__


def restore_optimizer(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Restore the state of an optimizer by parameter name.

    Learning rates, weight decay and all other settings remain those of this run, which may also
    group the parameters differently.

    Args:
        optimizer: Result of :func:`~flash_internimage.classification.optim.build_optimizer`.
        saved: State dict of an optimizer of the same type.

    Raises:
        ValueError: If the parameters or the shape of a state tensor differ, or the state contains
            NaN.
    """
    old_index, old_group = {}, {}
    for group in saved["param_groups"]:
        for name, index in zip(group["names"], group["params"], strict=True):
            old_index[name], old_group[name] = index, group
    state = optimizer.state_dict()
    names = [name for group in state["param_groups"] for name in group["names"]]
    if set(names) != old_index.keys():
        other = sorted(set(names) ^ old_index.keys())
        raise ValueError(f"the optimizer has other parameters, such as {other[0]}")
    entries, expected = {}, _first_entries(optimizer)
    for group in state["param_groups"]:
        for name, index in zip(group["names"], group["params"], strict=True):
            if old_index[name] in saved["state"]:
                entries[index] = saved["state"][old_index[name]]
                _check_entry(entries[index], expected[name], name)
        old = old_group[group["names"][0]]
        group |= {_STEP: old[_STEP]} if _STEP in old else {}
    optimizer.load_state_dict({"state": entries, "param_groups": state["param_groups"]})
    check_optimizer(optimizer)
    for values in optimizer.state.values():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and torch.isnan(value).any():
                raise ValueError(f"{name} of the optimizer holds NaN")
