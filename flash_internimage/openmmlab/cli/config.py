"""Configs of the scripts: loading, overriding and validating them."""

import argparse
import ast
import difflib
import inspect
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from mmengine.config import Config
from mmengine.runner import Runner

from ... import extras
from ...tracking import TRACKERS
from ..errors import describe, is_from_this_package

# Top-level keys that mmengine and the scripts read in addition to the runner's arguments.
_READ = {"activation_checkpointing", "compile", "efficient_conv_bn_eval", "find_unused_parameters"}
_READ |= {"loggers", "model_wrapper_cfg", "sync_bn", "tta_model", "tta_pipeline"}

# Sections of a config whose numbers are checked, and the names of these numbers.
_CHECKED = ["train_cfg", "optim_wrapper", "param_scheduler", "auto_scale_lr", "default_hooks"]
_CHECKED += ["train_dataloader", "val_dataloader", "test_dataloader", "randomness"]
_COUNTS = {"max_epochs", "max_iters", "val_interval", "batch_size", "accumulative_counts"}
_COUNTS |= {"base_batch_size"}
_NUMBERS = {"lr", "weight_decay", "momentum", "eps", "interval", "begin", "end"}
_NUMBERS |= {"start_factor", "end_factor", "factor", "gamma", "eta_min", "power"}
_LIMITS = {"max_norm", "clip_value"}

# Sections that must be dicts if they are set. Training requires the first three.
OF_TRAINING = ["train_cfg", "train_dataloader", "optim_wrapper"]
_SECTIONS = [*OF_TRAINING, "auto_scale_lr", "default_hooks", "env_cfg", "visualizer"]
_SECTIONS += ["val_dataloader", "test_dataloader"]

# Settings of mmdet 2 and mmseg 0, with their current replacements.
_OBSOLETE = {
    "auto_resume": "--resume",
    "checkpoint_config": "default_hooks.checkpoint",
    "cudnn_benchmark": "env_cfg.cudnn_benchmark",
    "data": "train_dataloader, val_dataloader and test_dataloader",
    "deterministic": "randomness.deterministic",
    "device": "CUDA_VISIBLE_DEVICES",
    "dist_params": "env_cfg.dist_cfg",
    "evaluation": "val_evaluator, train_cfg.val_interval and default_hooks.checkpoint.save_best",
    "fp16": "--amp",
    "gpu_ids": "torchrun and CUDA_VISIBLE_DEVICES",
    "gpus": "torchrun and CUDA_VISIBLE_DEVICES",
    "log_config": "default_hooks.logger and visualizer.vis_backends",
    "lr_config": "param_scheduler",
    "momentum_config": "param_scheduler",
    "mp_start_method": "env_cfg.mp_cfg.mp_start_method",
    "opencv_num_threads": "env_cfg.mp_cfg.opencv_num_threads",
    "optimizer": "optim_wrapper.optimizer",
    "optimizer_config": "optim_wrapper.clip_grad and optim_wrapper.accumulative_counts",
    "resume_from": "--resume CHECKPOINT",
    "runner": "train_cfg",
    "seed": "randomness.seed",
    "total_epochs": "train_cfg.max_epochs",
    "total_iters": "train_cfg.max_iters",
    "workflow": "train_cfg.val_interval",
}

# Those that were always dicts, and the keys of `data`. With other values they are variables.
_OBSOLETE_DICTS = {"checkpoint_config", "data", "dist_params", "evaluation", "log_config"}
_OBSOLETE_DICTS |= {"lr_config", "momentum_config", "optimizer", "optimizer_config", "runner"}
_OBSOLETE_KEYS_OF_DATA = {"train", "val", "test", "samples_per_gpu", "workers_per_gpu"}


def read_config(path: Path, import_custom_modules: bool = True) -> Config:
    """Read a config.

    Args:
        path: Path of the file.
        import_custom_modules: Whether to import what `custom_imports` of the config lists.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it cannot be read, or requires a package that is not installed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"config not found: {path}")
    try:
        return Config.fromfile(path, import_custom_modules=import_custom_modules)
    except (Exception, SystemExit) as error:  # Configs are programs and can raise anything.
        if is_from_this_package(error):
            raise
        if isinstance(error, ModuleNotFoundError):
            # mmengine's error about a base in a missing package has no name.
            name = error.name or str(error).partition(" ")[0]
            if requirement := extras.describe(ModuleNotFoundError(name=name)):
                raise ValueError(f"config {path} requires {requirement}") from error
        reason = f"{type(error).__name__}: {describe(error.__cause__ or error)}"
        raise ValueError(f"config {path} cannot be read: {reason}") from error


def config_of(args: argparse.Namespace) -> Config:
    """Load and validate the config of a command line; see :func:`load_config`."""
    return load_config(args.config, args.cfg_options, args.work_dir, args.launcher)


def load_config(
    path: Path,
    cfg_options: Mapping[str, Any] | None = None,
    work_dir: Path | None = None,
    launcher: str | None = None,
    option: str = "--cfg-options",
) -> Config:
    """Load and validate a config.

    Args:
        path: Path of the file.
        cfg_options: Values of settings that differ from the file, by dotted key.
        work_dir: Folder of logs and checkpoints; None for that of the config, or output/NAME.
        launcher: How processes are started; None for pytorch under torchrun, otherwise none.
        option: Command-line option of `cfg_options`, for error messages.

    Raises:
        FileNotFoundError: If the config does not exist.
        ValueError: If it cannot be read, a key is unknown or obsolete, or a value is invalid.
    """
    cfg_options = dict(cfg_options or {})
    cfg = read_config(path)
    variables = _used_variables(cfg.text)
    settings = [name for name in cfg if name not in variables and not _is_variable(cfg, name)]
    _refuse_obsolete(str(path), settings)
    _refuse_obsolete(option, [key.split(".")[0] for key in cfg_options])
    known = {*inspect.signature(Runner).parameters, *_READ}
    for name in cfg.keys() - known:
        # Unknown names may be variables. A common one, test_pipeline, resembles tta_pipeline.
        close = difflib.get_close_matches(name, known - {"tta_pipeline"}, n=1, cutoff=0.88)
        if close:
            raise ValueError(
                f"{path}: unknown key {name}; did you mean {close[0]}? Rename it if it is a "
                "variable"
            )
    for key in cfg_options:
        name = key.split(".")[0]
        if name in cfg and name not in known:
            raise ValueError(
                f"{option} {key}: {name} is a variable of {path} that has already been "
                "resolved; override the keys that use it, such as "
                "train_dataloader.dataset.data_root for data_root"
            )
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"{option} {key}: unknown key {name}{hint}")
    cfg.merge_from_dict(cfg_options)
    if "model" not in cfg:
        raise ValueError(f"{path} must contain a model")
    require_dicts(cfg, "model")
    require_dicts(cfg, *(name for name in _SECTIONS if cfg.get(name) is not None))
    for section in _CHECKED:
        _check_numbers(section, cfg.get(section))
    _add_loggers(cfg)
    cfg.launcher = launcher or ("pytorch" if dist.is_torchelastic_launched() else "none")
    cfg.work_dir = str(work_dir or cfg.get("work_dir") or Path("output", path.stem))
    return cfg


def loggers_of(cfg: Config) -> list[str]:
    """Return the names in the setting `loggers`, a name or a list of names."""
    names = cfg.get("loggers") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list | tuple):
        raise ValueError(f"loggers must be a list of names, got {names!r}")
    return list(dict.fromkeys(map(str, names)))


def _add_loggers(cfg: Config) -> None:
    """Add a backend to the visualizer for each of the `loggers`."""
    for name in loggers_of(cfg):
        if name not in TRACKERS:
            raise ValueError(f"loggers must be among {', '.join(TRACKERS)}, got {name!r}")
        if not isinstance(cfg.get("visualizer"), dict):
            raise ValueError(f"visualizer must be a dict for loggers, got {cfg.get('visualizer')}")
        added = {"type": "RunTrackerVisBackend", "tracker": name, "name": name}
        cfg.visualizer.vis_backends = [*(cfg.visualizer.get("vis_backends") or []), added]


def _used_variables(text: str) -> set[str]:
    """Return the variables that the files of a config read, given mmengine's text of them."""
    # Each file is preceded by a line with its path.
    lines = ["" if os.path.isfile(line) else line for line in text.splitlines()]
    used = set()
    with suppress(SyntaxError):  # JSON and YAML configs have no variables.
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                used.add(node.id)
            elif isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "_base_":
                used.add(node.attr)
    return used


def _is_variable(cfg: Config, name: str) -> bool:
    """Return whether an obsolete setting is unset, equals its replacement, or is a variable."""
    value = cfg.get(name)
    if name in _OBSOLETE_DICTS and not isinstance(value, Mapping):
        return True
    if name == "data" and not _OBSOLETE_KEYS_OF_DATA & value.keys():
        return True
    for key in _OBSOLETE.get(name, "").split("."):
        cfg = cfg.get(key) if isinstance(cfg, Mapping | Config) else None
    return value is None or value == cfg


def _refuse_obsolete(where: str, names: list[str]) -> None:
    if found := [name for name in names if name in _OBSOLETE]:
        current = "; ".join(f"for {name} use {_OBSOLETE[name]}" for name in found)
        raise ValueError(f"{where} has obsolete settings of mmdet 2 or mmseg 0: {current}")


def require_dicts(cfg: Config, *names: str) -> None:
    """Require that sections of a config are dicts."""
    for name in names:
        if not isinstance(cfg.get(name), dict):
            raise ValueError(f"{name} must be a dict, got {cfg.get(name)!r:.200}")


def _check_numbers(key: str, value: Any) -> None:
    """Check the numbers in a section of a config whose names are known."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            if name != "dataset":
                _check_numbers(f"{key}.{name}", item)
        return
    if isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_numbers(f"{key}.{i}", item)
        return
    name = key.rsplit(".", 1)[-1]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and not math.isfinite(value) and name not in (*_LIMITS, "norm_type"):
        raise ValueError(f"{key} must be finite, got {value}")
    whole = number and value % 1 == 0
    unset = value is None and name != "num_workers"
    for names, valid, accepted in (
        (_LIMITS, number and value > 0, "a positive number"),
        (_COUNTS, whole and value > 0, "a positive integer"),
        (("num_workers", "seed"), whole and value >= 0, "an integer of at least 0"),
        (("interval",), value != 0, "a positive integer, or -1 for never"),
        (_NUMBERS, number, "a number"),
    ):
        if name in names and not (valid or unset):
            raise ValueError(f"{key} must be {accepted}, got {value!r}")
