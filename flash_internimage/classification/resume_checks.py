"""Check that a run can be resumed from a checkpoint, and restore its optimizer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from ..checkpoints import check_optimizer
from ..nested import flatten

# Entries of last.pth, except `model_ema`, which requires an EMA.
_ENTRIES = (
    "model", "optimizer", "scaler", "epoch", "update", "updates_per_epoch", "totals", "best_top1",
    "nonfinite_in_a_row", "rng", "classes", "config",
)  # fmt: skip

_KINDS = {"optimizer": dict, "scaler": dict, "rng": list, "classes": list, "config": dict}

# Settings that cannot change on resuming, as weights and optimizer state would not match, and that
# every checkpoint contains.
_RECORDED = (
    "model.name", "model.num_classes", "model.initial_checkpoint", "model.class_map",
    "optimizer.name",
)  # fmt: skip
_FIXED = (*_RECORDED, "model.freeze")

# Settings that determine which images of an epoch remain.
_FIXED_WITHIN_EPOCH = ("seed", "batch_size", "accumulation_steps")

# Settings that must be equal for the accuracies of two epochs to be comparable.
_VALIDATION_SETTINGS = (
    "data.val_split", "data.image_size", "data.crop_pct", "data.interpolation", "data.mean",
    "data.std",
)  # fmt: skip

# Some optimizers count steps in their parameter groups. All other entries there are settings.
_STEP = "step"


# --- entries and settings -------------------------------------------------------------------------


def check_entries(checkpoint: Mapping[str, Any]) -> None:
    """Check that a checkpoint has all entries of a training run.

    Raises:
        ValueError: If entries are missing, as in a file with only weights, or of another type.
    """
    missing = [name for name in _ENTRIES if name not in checkpoint]
    if missing:
        raise ValueError(
            f"it must be a checkpoint of classification.train, missing: {', '.join(missing)}"
        )
    for name, kind in _KINDS.items():
        if not isinstance(checkpoint[name], kind):
            raise ValueError(f"{name} must be a {kind.__name__}, got {checkpoint[name]!r:.100}")
    if not checkpoint["rng"] or not all(isinstance(one, dict) for one in checkpoint["rng"]):
        raise ValueError(f"rng must contain a dict per process, got {checkpoint['rng']!r:.100}")
    settings = flatten(checkpoint["config"])
    if missing := [key for key in _RECORDED if key not in settings]:
        raise ValueError(f"config must contain all settings of the run, missing: {missing[0]}")


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
                f"{key} must be {before[key]!r} as in the checkpoint, got {now[key]!r}; to start a "
                "new run from its weights, set model.initial_checkpoint"
            )
    for key in _FIXED_WITHIN_EPOCH if within_epoch else ():
        if before.get(key, now[key]) != now[key]:
            raise ValueError(
                f"{key} must be {before[key]!r} as in the checkpoint, which was saved within an "
                f"epoch, got {now[key]!r}"
            )


def validates_alike(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether accuracies measured with two sets of settings are comparable."""
    return all(before.get(key, now[key]) == now[key] for key in _VALIDATION_SETTINGS)


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a message for every setting that differs or exists on only one side."""
    return [
        f"{key} was {before.get(key)}, is now {now.get(key)}"
        for key in {**now, **before}
        if before.get(key) != now.get(key)
    ]


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
            f"optimizer state of {name} must contain {', '.join(expected)}, got {found:.200}"
        )
    for key, value in entry.items():
        shown, right = _describe_value(value), _describe_value(expected[key])
        if shown != right:
            raise ValueError(f"optimizer state {key} of {name} must be {right}, got {shown}")


def _describe_value(value: Any) -> str:
    if isinstance(value, torch.Tensor) and value.ndim:
        return f"a tensor of shape {tuple(value.shape)}"
    is_number = isinstance(value, (torch.Tensor, int, float))
    return "a number" if is_number else type(value).__name__


def restore_optimizer(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Restore the state of an optimizer by parameter name.

    Learning rates, weight decay and all other settings remain those of this run, which may also
    group the parameters differently.

    Args:
        optimizer: Result of :func:`~.optim.build_optimizer`.
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
        raise ValueError(
            f"the optimizer's parameters differ from the checkpoint's, first: {other[0]}"
        )
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
                raise ValueError(f"optimizer state {name} contains NaN")
