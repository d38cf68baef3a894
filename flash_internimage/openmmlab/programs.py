"""The command lines of the training and test programs of detection and segmentation."""

import argparse
import difflib
import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from mmengine.config import Config, DictAction
from mmengine.logging import print_log

from .runtime import FlashRunner

# What the engine and the programs read of a configuration beside the runner's arguments.
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


class _Settings(DictAction):
    def __call__(self, parser, namespace, values, option_string=None) -> None:
        for value in values:
            if "=" not in value:
                parser.error(f"{option_string} takes KEY=VALUE, got {value}; CONFIG comes before")
        super().__call__(parser, namespace, values, option_string)


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
    """The arguments of a training program."""
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
    """The arguments of a test program that all tasks have."""
    parser = _parser(program, description)
    parser.add_argument("checkpoint", help="a path or an address, of this or the published code")
    return parser


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with the message alone where arguments or a configuration are wrong."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error


def build_runner(cfg: Config) -> FlashRunner:
    """The runner of a configuration; processes without GPUs talk by gloo."""
    if cfg.launcher == "pytorch" and not torch.cuda.is_available() and not dist.is_initialized():
        dist.init_process_group("gloo")
    return FlashRunner.from_cfg(cfg)


def _load_config(args: argparse.Namespace) -> Config:
    if not args.config.is_file():
        raise FileNotFoundError(f"config not found: {args.config}")
    cfg = Config.fromfile(args.config)
    known = {*inspect.signature(FlashRunner).parameters, *_READ}
    for name in cfg.keys() - known:
        # all else may be a variable, and mmdet's and mmseg's are often called like test_pipeline
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
    cfg.launcher = args.launcher or ("pytorch" if dist.is_torchelastic_launched() else "none")
    cfg.work_dir = str(args.work_dir or cfg.get("work_dir") or Path("output", args.config.stem))
    return cfg


def training_runner(args: argparse.Namespace) -> FlashRunner:
    """The runner for the arguments of :func:`training_parser`.

    Raises:
        FileNotFoundError: there is no such configuration or checkpoint.
        ValueError: the work folder holds another run, or the configuration does not say what the
            learning rate is made for.
    """
    cfg = _load_config(args)
    if args.amp == "fp16":
        cfg.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic", dtype="float16")
    elif args.amp == "bf16":
        cfg.optim_wrapper.type = "BFloat16OptimWrapper"
    if args.amp:
        _add_hook(cfg, "Float32OutputsHook")
    if args.auto_scale_lr:
        if "base_batch_size" not in cfg.get("auto_scale_lr", {}):
            raise ValueError("--auto-scale-lr needs auto_scale_lr.base_batch_size in the config")
        cfg.auto_scale_lr.enable = True
    if args.compile:
        _add_hook(cfg, "CompileBackboneHook")
    last = latest_checkpoint(Path(cfg.work_dir))
    if last and not args.resume:
        raise ValueError(f"{last} exists: pass --resume to go on, or another --work-dir")
    if args.resume:
        last = last if args.resume == "auto" else args.resume
        if last is None:
            print_log(f"no checkpoint in {cfg.work_dir}: training starts anew", level=logging.INFO)
        else:
            cfg.resume, cfg.load_from = True, str(last)
    if cfg.get("load_from"):
        cfg.model.backbone.init_cfg = None  # else downloaded, and overwritten
    return build_runner(cfg)


def _add_hook(cfg: Config, name: str) -> None:
    cfg.custom_hooks = [*cfg.get("custom_hooks", []), {"type": name}]


def latest_checkpoint(work_dir: Path) -> Path | None:
    """The checkpoint of the highest epoch or iteration in a work folder.

    The engine's own note of it, last_checkpoint, may be behind or empty after a kill.
    """
    found = [*work_dir.glob("epoch_*.pth"), *work_dir.glob("iter_*.pth")]
    return max(found, key=lambda path: int(path.stem.split("_")[1]), default=None)


def evaluation_config(args: argparse.Namespace) -> Config:
    """The configuration for the arguments of :func:`evaluation_parser`, without the training's.

    Raises:
        FileNotFoundError: there is no such configuration.
        ValueError: an option is not known.
    """
    cfg = _load_config(args)
    unused = "train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler", "auto_scale_lr"
    for name in (*unused, "val_dataloader", "val_cfg", "val_evaluator"):
        cfg[name] = None
    cfg.load_from = args.checkpoint
    return cfg
