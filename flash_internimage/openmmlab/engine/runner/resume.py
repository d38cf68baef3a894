"""Resuming a run from the state of a checkpoint with the settings of the current config.

mmengine restores the optimizer and the schedules entirely from the checkpoint, so changed settings
are ignored. Here the current settings always apply, and a checkpoint that cannot be continued with
them is an error before training starts.
"""

import copy
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.hooks import EMAHook
from mmengine.optim import OptimWrapperDict
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.optim import Optimizer

# Entries of a scheduler's state that change while training. All others are its settings.
_PROGRESS: tuple[str, ...] = ("last_step", "_global_step", "_last_value", "best", "num_bad_epochs")
_PROGRESS += ("cooldown_counter",)

# Options of a parameter group that do not identify its optimizer: those that select an
# implementation, and those that schedules and constructors add.
_COMMON = {"params", "param_names", "foreach", "fused", "capturable", "differentiable", "maximize"}
_COMMON |= {"decoupled_weight_decay", "lr", "initial_lr", "momentum", "initial_momentum"}
_COMMON |= {"lr_scale", "group_name"}


def describe_run(runner: Runner) -> dict[str, Any]:
    """Return what a checkpoint must record to be resumed with other settings."""
    described: dict[str, Any] = {"train_loop": _count_unit(runner)}
    if not isinstance(runner.optim_wrapper, OptimWrapperDict):
        described["optimizer_type"] = type(runner.optim_wrapper.optimizer).__name__
        described["optimizer_names"] = _parameter_names(runner)
    return described


def compare_classes(checkpoint: Mapping, dataset: Any) -> tuple[str | None, bool]:
    """Compare the class names of a checkpoint with those of a dataset.

    Returns:
        A phrase that describes the first difference, or None if there is none or one of them has no
        class names, and whether a class is at another position.
    """
    saved = _class_names(_get(checkpoint.get("meta"), "dataset_meta"))
    own = _class_names(getattr(dataset, "metainfo", None))
    if not saved or not own or saved == own:
        return None, False
    positions = {name: i for i, name in enumerate(own)}
    shifted = any(positions.get(name, i) != i for i, name in enumerate(saved))
    if len(saved) != len(own):
        return f"it has {len(saved)} classes, the data {len(own)}", shifted
    i = next(i for i, name in enumerate(own) if name != saved[i])
    return f"its class {i} is {saved[i]!r:.50}, but {own[i]!r:.50} in the data", shifted


def adapt_checkpoint(runner: Runner, checkpoint: dict) -> bool:
    """Adapt a checkpoint in place to the settings of the run that resumes from it.

    Args:
        runner: Resumed run, with its optimizer and schedules built.
        checkpoint: Contents of the checkpoint.

    Returns:
        Whether the schedules differ from those of the checkpoint, see :func:`replay_schedules`.

    Raises:
        ValueError: If the checkpoint cannot be continued with the settings. The message says why.
    """
    meta = checkpoint["meta"]
    _adapt_progress(runner, meta)
    difference, _ = compare_classes(checkpoint, runner.train_dataloader.dataset)
    if difference:
        raise ValueError(f"{difference}; to change the classes, start a new run with load_from")
    if runner._randomness_cfg.get("seed") is not None:
        meta.pop("seed", None)  # mmengine would use it, with a warning.
    if not any(isinstance(hook, EMAHook) for hook in runner.hooks):
        _use_trained_weights(runner, checkpoint)
    if isinstance(runner.optim_wrapper, OptimWrapperDict):
        raise ValueError("runs with several optimizers cannot be resumed")
    if "optimizer" not in checkpoint:
        raise ValueError(
            "it has no optimizer state; to start from its weights, pass it as load_from"
        )
    changed = _are_changed(runner, checkpoint)
    checkpoint["optimizer"] = _adapt_optimizer(
        runner, checkpoint["optimizer"], meta, keep_scheduled=not changed
    )
    if changed:
        checkpoint.pop("param_schedulers", None)
    return changed


def replay_schedules(runner: Runner) -> None:
    """Advance newly built schedules to the progress of the run, as if used from the start."""
    schedulers = runner.param_schedulers or []
    by_iter = [scheduler for scheduler in schedulers if not scheduler.by_epoch]
    by_epoch = [scheduler for scheduler in schedulers if scheduler.by_epoch]
    in_epochs = isinstance(runner.train_loop, EpochBasedTrainLoop)
    length = len(runner.train_dataloader) if in_epochs else 0
    with warnings.catch_warnings():
        # Schedulers warn if they are stepped without their optimizer.
        warnings.simplefilter("ignore")
        for i in range(1, runner.iter + 1):
            for scheduler in by_iter:
                scheduler.step()
            if in_epochs and i % length == 0:
                for scheduler in by_epoch:
                    scheduler.step()


def set_sampler_seed(runner: Runner) -> None:
    """Give the sampler the run's seed, which a checkpoint may have changed since it was built."""
    loader = runner.train_dataloader
    for sampler in (loader.sampler, getattr(loader.batch_sampler, "sampler", loader.sampler)):
        if hasattr(sampler, "seed"):
            sampler.seed = runner.seed


def _get(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else None


def _class_names(dataset_meta: Any) -> list:
    names = _get(dataset_meta, "classes")
    return [*names] if isinstance(names, list | tuple) else []


def _count_unit(runner: Runner) -> str:
    return "epochs" if isinstance(runner.train_loop, EpochBasedTrainLoop) else "iterations"


def _adapt_progress(runner: Runner, meta: dict) -> None:
    """Check the progress, and convert epochs to iterations of this run's epoch length."""
    own = _count_unit(runner)
    unit = meta.get("train_loop", own)
    if unit != own:
        saved = f"{unit!s:.20}".removesuffix("s")
        raise ValueError(
            f"the checkpoint is from an {saved}-based run, but this run is "
            f"{own.removesuffix('s')}-based"
        )
    _check_progress(meta, "epoch", runner.max_epochs)
    if unit == "epochs":
        _check_progress(meta, "iter", None)
        iterations = meta["epoch"] * len(runner.train_dataloader)
        if meta["iter"] != iterations:
            runner.logger.warning(
                "the checkpoint's %d iterations count as %d: training continues after epoch %d",
                meta["iter"], iterations, meta["epoch"],
            )  # fmt: skip
        meta["iter"] = iterations
    _check_progress(meta, "iter", runner.max_iters)


def _check_progress(meta: dict, name: str, last: int | None) -> None:
    number = meta[name]
    if type(number) is not int or number < 0:
        raise ValueError(f"meta.{name} must be a non-negative integer, got {number!r:.20}")
    if last is not None and number > last:
        what = "iteration" if name == "iter" else name
        raise ValueError(f"the checkpoint is at {what} {number}, but max_{name}s is {last}")


def _use_trained_weights(runner: Runner, checkpoint: dict) -> None:
    """Restore the trained weights if the checkpoint has averaged ones in their place."""
    averaged = checkpoint.pop("ema_state_dict", None)
    if averaged is None:
        return
    runner.logger.warning(
        "no EMAHook: training continues without the checkpoint's averaged weights"
    )
    for name, tensor in averaged.items():
        if name.startswith("module."):
            checkpoint["state_dict"][name.removeprefix("module.")] = tensor


def _are_changed(runner: Runner, checkpoint: dict) -> bool:
    """Return whether the schedules changed; if not, reduce the saved ones to their progress."""
    own = [s.state_dict() for s in runner.param_schedulers or []]
    saved = checkpoint.get("param_schedulers") or []
    if len(own) == len(saved) and all(map(_agree, own, saved)):
        checkpoint["param_schedulers"] = [
            {name: value for name, value in state.items() if name in _PROGRESS} for state in saved
        ]
        return False
    if any(getattr(s, "need_val_args", False) for s in runner.param_schedulers or []):
        raise ValueError("metric-based param_schedulers cannot be changed when resuming")
    if own or saved:
        runner.logger.warning(
            "param_scheduler or the learning rate differs from the checkpoint's: continuing as if "
            "the new schedule had been used from the start"
        )
    return True


def _agree(own: Any, saved: Any) -> bool:
    return (
        isinstance(saved, Mapping)
        and type(saved.get("last_step")) is type(saved.get("_global_step")) is int
        and own.keys() == saved.keys()
        and all(own[name] == saved[name] for name in own.keys() - set(_PROGRESS))
    )


def _adapt_optimizer(runner: Runner, saved: dict, meta: dict, keep_scheduled: bool) -> dict:
    """Return an optimizer state with the run's options and the moments of the checkpoint."""
    wrapper = runner.optim_wrapper
    optimizer = wrapper.optimizer
    own = optimizer.state_dict()
    groups = saved["param_groups"]
    _check_type(optimizer, groups, meta.get("optimizer_type"))
    indices = [i for group in groups for i in group["params"]]
    names = meta.get("optimizer_names")
    if names is None:
        sizes = [[len(group["params"]) for group in g] for g in (groups, own["param_groups"])]
        if sizes[0] != sizes[1]:
            raise ValueError("its parameter groups differ (paramwise_cfg, frozen_stages)")
        names = _parameter_names(runner)
    moments = {
        name: saved["state"][i]
        for name, i in zip(names, indices, strict=True)
        if i in saved["state"]
    }
    _check_moments(optimizer, moments)
    state = {i: moments[name] for i, name in enumerate(_parameter_names(runner)) if name in moments}
    if keep_scheduled:
        _keep_scheduled(runner, [*own["param_groups"]], saved)
    adapted = {"state": state, "param_groups": own["param_groups"]}
    scaler = getattr(wrapper, "loss_scaler", None)
    if scaler is not None and scaler.is_enabled() and saved.get("loss_scaler"):
        # A static scale comes from the config; a dynamic one keeps the value that it has reached.
        kept = () if wrapper._scale_update_param else ("scale", "_growth_tracker")
        reached = {name: saved["loss_scaler"][name] for name in kept}
        adapted["loss_scaler"] = scaler.state_dict() | reached
    return adapted


def _parameter_names(runner: Runner) -> list[str]:
    """Return the names of the parameters in the order of the optimizer's state."""
    names = {id(parameter): name for name, parameter in runner.model.named_parameters()}
    groups = runner.optim_wrapper.optimizer.param_groups
    parameters = [parameter for group in groups for parameter in group["params"]]
    return [names[id(parameter)].removeprefix("module.") for parameter in parameters]


def _check_type(optimizer: Optimizer, groups: Sequence[dict], saved: str | None) -> None:
    own = type(optimizer).__name__
    advice = "to start from its weights with another optimizer, pass it as load_from"
    if saved is not None and saved != own:
        raise ValueError(f"it was trained with {saved!s:.50}, but this run uses {own}; {advice}")
    options = optimizer.param_groups[0].keys() ^ groups[0].keys()
    if saved is None and options - _COMMON:
        raise ValueError(f"its optimizer is not {own} ({', '.join(sorted(options))}); {advice}")


def _check_moments(optimizer: Optimizer, moments: Mapping[str, dict]) -> None:
    """Check that the state has all that the options need, such as the maximum of amsgrad."""
    group = optimizer.param_groups[0]
    probe = torch.nn.Parameter(group["params"][0].detach().clone())
    probe.grad = torch.zeros_like(probe)
    trial = copy.copy(optimizer)
    trial.state, trial.param_groups = defaultdict(dict), [{**group, "params": [probe]}]
    trial.step()
    needed = {name for name, value in trial.state[probe].items() if value is not None}
    for parameter, state in moments.items():
        if state and (missing := needed - state.keys()):
            raise ValueError(
                f"the settings of {type(optimizer).__name__} require {', '.join(sorted(missing))} "
                f"for {parameter}, which the checkpoint lacks"
            )


def _keep_scheduled(runner: Runner, groups: list[dict], saved: dict) -> None:
    """Copy the values that the schedules have reached into the parameter groups."""
    reached = [*saved["param_groups"]]
    if runner.optim_wrapper.base_param_settings is not None:
        groups = [*groups, runner.optim_wrapper.base_param_settings]
        reached.append(saved["base_param_settings"])
    for scheduler in runner.param_schedulers or []:
        for group, values in zip(groups, reached, strict=True):
            group[scheduler.param_name] = values[scheduler.param_name]
            if getattr(scheduler, "use_betas", False):
                group["betas"] = (group["momentum"], group["betas"][1])
