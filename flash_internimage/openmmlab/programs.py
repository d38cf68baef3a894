"""Command lines of the training and test programs for detection and segmentation."""

import argparse
import ast
import difflib
import inspect
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.config import Config, DictAction
from mmengine.dist import broadcast_object_list, init_dist, is_main_process
from mmengine.logging import print_log
from mmengine.runner import Runner
from mmengine.utils.dl_utils import set_multi_processing

from ..files import own_folder, require_writable
from .checkpoint_names import check_checkpoint_names, checkpoint_folder, latest_checkpoint
from .errors import describe, is_from_this_package
from .runtime import FlashRunner

# Top-level keys that mmengine and the programs read in addition to the runner's arguments.
_READ = (
    "activation_checkpointing",
    "compile",
    "efficient_conv_bn_eval",
    "find_unused_parameters",
    "model_wrapper_cfg",
    "sync_bn",
    "tta_model",
    "tta_pipeline",
)

# Sections of a config whose numbers are checked, and the names of these numbers.
_CHECKED = ("train_cfg", "optim_wrapper", "param_scheduler", "auto_scale_lr", "default_hooks")
_CHECKED += ("train_dataloader", "val_dataloader", "test_dataloader", "randomness")
_COUNTS = {"max_epochs", "max_iters", "val_interval", "batch_size", "accumulative_counts"}
_COUNTS |= {"base_batch_size"}
_NUMBERS = {"lr", "weight_decay", "momentum", "eps", "interval", "begin", "end"}
_NUMBERS |= {"start_factor", "end_factor", "factor", "gamma", "eta_min", "power"}
_LIMITS = {"max_norm", "clip_value"}

# Sections that must be dicts if they are set. Training requires the first three.
_OF_TRAINING = ("train_cfg", "train_dataloader", "optim_wrapper")
_SECTIONS = (*_OF_TRAINING, "auto_scale_lr", "default_hooks", "env_cfg", "visualizer")
_SECTIONS += ("val_dataloader", "test_dataloader")

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
_OBSOLETE_DICTS = ("checkpoint_config", "data", "dist_params", "evaluation", "log_config")
_OBSOLETE_DICTS += ("lr_config", "momentum_config", "optimizer", "optimizer_config", "runner")
_OBSOLETE_KEYS_OF_DATA = {"train", "val", "test", "samples_per_gpu", "workers_per_gpu"}

# The program that starts the processes of a launcher, and the variables that it sets.
_LAUNCHERS = {
    "pytorch": ("torchrun", ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")),
    "slurm": ("srun", ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_NODELIST")),
    "mpi": ("mpirun", ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MASTER_ADDR")),
}


class _Settings(DictAction):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Sequence[str],
        option_string: str | None = None,
    ) -> None:
        for value in values:
            if "=" not in value:
                parser.error(f"{option_string} takes KEY=VALUE, got {value}; CONFIG comes before")
        try:
            super().__call__(parser, namespace, values, option_string)
        except AssertionError as error:
            parser.error(f"{option_string}: {error}")


def _parser(program: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"python -m {program}", description=description)
    parser.add_argument("config", type=Path, help="a file of configs/")
    parser.add_argument(
        "--work-dir", type=Path, help="for logs and checkpoints, default output/<config's name>"
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=_Settings,
        metavar="KEY=VALUE",
        help='override settings, such as optim_wrapper.optimizer.lr=1e-4 or "key=[a,b]"',
    )
    parser.add_argument(
        "--launcher",
        choices=("none", "pytorch", "slurm", "mpi"),
        help="who starts the processes; by default pytorch under torchrun, none otherwise",
    )
    return parser


def training_parser(program: str, description: str) -> argparse.ArgumentParser:
    """Return the argument parser of a training program."""
    parser = _parser(program, description)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="go on from a checkpoint; without a value from the work folder's last one, if any",
    )
    parser.add_argument(
        "--amp",
        nargs="?",
        const="fp16",
        choices=("fp16", "bf16"),
        help="mixed precision, fp16 unless given (GPUs only)",
    )
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate with the number of images per update",
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the backbone with torch.compile"
    )
    return parser


def evaluation_parser(program: str, description: str) -> argparse.ArgumentParser:
    """Return an argument parser with the arguments that all test programs share."""
    parser = _parser(program, description)
    parser.add_argument("checkpoint", help="a path or an address, of this or the published code")
    return parser


def run_training(args: argparse.Namespace) -> None:
    """Train with the arguments of :func:`training_parser`, locking the work folder.

    Raises:
        OSError: If the work folder or the folder of the checkpoints is in use by another run or
            cannot be written.
        ValueError: See :func:`training_runner`.
    """
    cfg = _load_config(args)
    _start_processes(cfg)
    with _own_folders(cfg):
        _training_runner(args, cfg).train()


@contextmanager
def _own_folders(cfg: Config) -> Iterator[None]:
    """Lock the folders of a run in the main process; if that fails, all processes end."""
    folders = {"--work-dir": Path(cfg.work_dir)}
    checkpoints = _checkpoint_folder(cfg)
    if checkpoints.resolve() != folders["--work-dir"].resolve():
        folders["default_hooks.checkpoint.out_dir"] = checkpoints
    problem = [None]
    with ExitStack() as stack:
        for option, folder in folders.items() if is_main_process() else ():
            try:
                stack.enter_context(own_folder(folder))
            except OSError as error:
                problem = [f"{option} {folder} cannot be written: {error.strerror}"]
                if error.filename is None:
                    problem = [describe(error)]
                break
        broadcast_object_list(problem)
        if problem[0]:
            raise OSError(problem[0]) if is_main_process() else SystemExit(2)
        yield


def build_runner(cfg: Config) -> FlashRunner:
    """Build the runner of a config. Without GPUs, processes communicate through gloo."""
    _start_processes(cfg)
    return FlashRunner.from_cfg(cfg)


def _start_processes(cfg: Config) -> None:
    if cfg.launcher == "none" or dist.is_initialized():
        return
    program, names = _LAUNCHERS[cfg.launcher]
    if missing := [name for name in names if name not in os.environ]:
        raise ValueError(
            f"--launcher {cfg.launcher} needs processes that {program} has started: "
            f"{', '.join(missing)} is not set"
        )
    if cfg.launcher == "pytorch" and not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return
    env_cfg = cfg.get("env_cfg") or {}
    set_multi_processing(**env_cfg.get("mp_cfg", {}), distributed=True)
    init_dist(cfg.launcher, **env_cfg.get("dist_cfg", {}))


def _load_config(args: argparse.Namespace) -> Config:
    if not args.config.is_file():
        raise FileNotFoundError(f"config not found: {args.config}")
    try:
        cfg = Config.fromfile(args.config)
    except (Exception, SystemExit) as error:  # Configs are programs and can raise anything.
        if is_from_this_package(error):
            raise
        reason = f"{type(error).__name__}: {describe(error.__cause__ or error)}"
        raise ValueError(f"config {args.config} cannot be read: {reason}") from error
    variables = _used_variables(cfg.text)
    settings = [name for name in cfg if name not in variables and not _is_variable(cfg, name)]
    _refuse_obsolete(str(args.config), settings)
    _refuse_obsolete("--cfg-options", [key.split(".")[0] for key in args.cfg_options or {}])
    known = {*inspect.signature(Runner).parameters, *_READ}
    for name in cfg.keys() - known:
        # Unknown names may be variables. A common one, test_pipeline, resembles tta_pipeline.
        close = difflib.get_close_matches(name, known - {"tta_pipeline"}, n=1, cutoff=0.88)
        if close:
            raise ValueError(
                f"{args.config}: nothing reads {name}; did you mean {close[0]}? If it is a "
                "variable, it needs a name less like that"
            )
    for key in args.cfg_options or {}:
        name = key.split(".")[0]
        if name in cfg and name not in known:
            raise ValueError(
                f"--cfg-options {key}: {name} is a variable within {args.config} that has done its "
                "work; set what it is used in, as train_dataloader.dataset.data_root for data_root"
            )
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"--cfg-options {key}: there is no {name} in {args.config}{hint}")
    cfg.merge_from_dict(args.cfg_options or {})
    _require_dicts(cfg, "model")
    _require_dicts(cfg, *(name for name in _SECTIONS if cfg.get(name) is not None))
    for section in _CHECKED:
        _check_numbers(section, cfg.get(section))
    cfg.launcher = args.launcher or ("pytorch" if dist.is_torchelastic_launched() else "none")
    cfg.work_dir = str(args.work_dir or cfg.get("work_dir") or Path("output", args.config.stem))
    return cfg


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
        today = "; ".join(f"for {name} use {_OBSOLETE[name]}" for name in found)
        raise ValueError(
            f"{where} has settings of mmdet 2 or mmseg 0, which nothing reads: {today}"
        )


def _require_dicts(cfg: Config, *names: str) -> None:
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
    if name in _LIMITS and value is not None and not (number and value > 0):
        raise ValueError(f"{key} must be a positive number, got {value!r}")
    if number and not math.isfinite(value) and name not in (*_LIMITS, "norm_type"):
        raise ValueError(f"{key} must be finite, got {value}")
    if name in _COUNTS and value is not None and not (number and value > 0 and value % 1 == 0):
        raise ValueError(f"{key} must be a positive integer, got {value!r}")
    unset = name == "seed" and value is None
    if name in ("num_workers", "seed") and not (
        unset or (number and value >= 0 and value % 1 == 0)
    ):
        raise ValueError(f"{key} must be an integer of at least 0, got {value!r}")
    if name == "interval" and value == 0:
        raise ValueError(f"{key} must be a positive integer, or -1 for never, got 0")
    if name in _NUMBERS and value is not None and not number:
        raise ValueError(f"{key} must be a number, got {value!r}")


def training_runner(args: argparse.Namespace) -> FlashRunner:
    """Build the runner for the arguments of :func:`training_parser`.

    Raises:
        FileNotFoundError: If the config or checkpoint does not exist.
        ValueError: If the work folder contains another run, the config cannot be read or has
            invalid values, or `--auto-scale-lr` is given without a `base_batch_size`.
    """
    return _training_runner(args, _load_config(args))


def _training_runner(args: argparse.Namespace, cfg: Config) -> FlashRunner:
    _require_dicts(cfg, *_OF_TRAINING)
    if args.amp == "fp16":
        cfg.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic", dtype="float16")
    elif args.amp == "bf16":
        cfg.optim_wrapper.type = "BFloat16OptimWrapper"
    if args.amp:
        _add_hook(cfg, "Float32OutputsHook")
    if args.auto_scale_lr:
        if "base_batch_size" not in (cfg.get("auto_scale_lr") or {}):
            raise ValueError("--auto-scale-lr needs auto_scale_lr.base_batch_size in the config")
        cfg.auto_scale_lr.enable = True
    if args.compile:
        _add_hook(cfg, "CompileBackboneHook")
    last = _find_checkpoint(cfg)
    resume = args.resume or (cfg.get("resume") and (cfg.get("load_from") or "auto"))
    if last and not resume:
        raise ValueError(f"{last} exists: pass --resume to go on, or another --work-dir")
    if resume:
        if Path(resume).is_dir() and resume != "auto":
            raise ValueError(
                f"--resume must be a checkpoint, got the folder {resume}; to go on in a work "
                f"folder, pass --work-dir {resume} --resume"
            )
        last = last if resume == "auto" else resume
        if last is None:
            cfg.resume = False  # mmengine would search on its own.
        else:
            cfg.resume, cfg.load_from = True, str(last)
    if cfg.get("load_from") and "backbone" in cfg.model:
        cfg.model.backbone.init_cfg = None  # else downloaded only to be overwritten
    runner = build_runner(cfg)
    if resume and last is None:
        print_log(
            f"no checkpoint in {_checkpoint_folder(cfg)}: training starts at the beginning",
            logger="current",
            level=logging.INFO,
        )
    return runner


def _add_hook(cfg: Config, name: str) -> None:
    cfg.custom_hooks = [*(cfg.get("custom_hooks") or []), {"type": name}]


def _checkpoint_hook(cfg: Config) -> Mapping:
    hook = (cfg.get("default_hooks") or {}).get("checkpoint")
    return hook if isinstance(hook, Mapping) else {}


def _checkpoint_folder(cfg: Config) -> Path:
    """Validate the checkpoint hook's settings and return the folder in which it saves."""
    out_dir, template = map(_checkpoint_hook(cfg).get, ("out_dir", "filename_tmpl"))
    try:
        check_checkpoint_names(out_dir, template)
    except ValueError as error:
        raise ValueError(f"default_hooks.checkpoint.{error}") from error
    return Path(checkpoint_folder(cfg.work_dir, out_dir))


def _find_checkpoint(cfg: Config) -> Path | None:
    """Return the latest checkpoint of the run in the work folder."""
    hook = _checkpoint_hook(cfg)
    template, by_epoch = hook.get("filename_tmpl"), hook.get("by_epoch", True)
    for folder in (_checkpoint_folder(cfg), Path(cfg.work_dir)):
        if found := latest_checkpoint(folder, template, by_epoch):
            return found
    # mmengine's record finds checkpoints of a run with another out_dir or filename_tmpl.
    note = Path(cfg.work_dir, "last_checkpoint")
    noted = note.read_text(errors="replace").strip() if note.is_file() else ""
    return Path(noted) if os.path.isfile(noted) else None


def _stops_training(hook: Any) -> bool:
    """Return whether a hook is an EarlyStoppingHook, which requires a training loop."""
    kind = hook.get("type") if isinstance(hook, dict) else type(hook)
    return (kind if isinstance(kind, str) else kind.__name__).endswith("EarlyStoppingHook")


def evaluation_config(args: argparse.Namespace, tta: bool = False) -> Config:
    """Return the config for the arguments of :func:`evaluation_parser`.

    See :func:`prepare_evaluation`.

    Raises:
        FileNotFoundError: If the config does not exist.
        OSError: If the work folder cannot be written.
        ValueError: If the config cannot be read or an option is unknown.
    """
    return prepare_evaluation(_load_config(args), args.checkpoint, tta)


def prepare_evaluation(cfg: Config, checkpoint: str, tta: bool = False) -> Config:
    """Change a config in place to evaluate a checkpoint.

    Args:
        cfg: Config, with a work folder and a launcher.
        checkpoint: Path or URL of the checkpoint.
        tta: Test at several scales, with and without flip, as configured in `tta_model`.

    Returns:
        `cfg`, in which everything that only training and validation need is None.

    Raises:
        OSError: If the work folder cannot be written.
    """
    require_writable(Path(cfg.work_dir), "--work-dir")
    if tta:
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.model = {**cfg.tta_model, "module": cfg.model}
    unused = "train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler", "auto_scale_lr"
    for name in (*unused, "val_dataloader", "val_cfg", "val_evaluator"):
        cfg[name] = None
    hooks = cfg.get("custom_hooks") or []
    cfg.custom_hooks = [hook for hook in hooks if not _stops_training(hook)]
    cfg.load_from = checkpoint
    return cfg
