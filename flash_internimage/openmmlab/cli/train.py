"""Command line of the training scripts."""

import argparse
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import broadcast_object_list, is_main_process

from ...files import own_folder
from ...tracking import check_packages
from ..engine.runner.checkpoint_names import (
    check_checkpoint_names,
    checkpoint_folder,
    latest_checkpoint,
)
from ..engine.runner.runner import SafeRunner
from ..errors import describe, one_line_errors
from ..utils import log_info, log_warning
from .common import base_parser, build_runner, ending_together, start_processes
from .config import OF_TRAINING, config_of, loggers_of, require_dicts


def training_parser(program: str, description: str) -> argparse.ArgumentParser:
    """Return the argument parser of a training script."""
    parser = base_parser(program, description)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="resume from CHECKPOINT (default: the latest in the work dir, if any)",
    )
    parser.add_argument(
        "--amp",
        nargs="?",
        const="fp16",
        choices=("fp16", "bf16"),
        help="mixed precision in fp16 (the default, GPUs only) or bf16 (GPUs and CPUs)",
    )
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate with the total batch size",
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the backbone with torch.compile"
    )
    return parser


def main(program: str, description: str, argv: list[str] | None = None) -> None:
    """Parse a command line and train, reporting user errors in one line.

    Args:
        program: Name of the program in usage messages.
        description: Description of the program in its help.
        argv: Arguments; None for those of the process.
    """
    args = training_parser(program, description).parse_args(argv)
    with one_line_errors(), ending_together():
        run_training(args)


def run_training(args: argparse.Namespace) -> None:
    """Train with the arguments of :func:`training_parser`, locking the work folder.

    Raises:
        OSError: If the work folder or the folder of the checkpoints is in use by another run or
            cannot be written.
        ValueError: See :func:`training_runner`.
    """
    cfg = config_of(args)
    start_processes(cfg)
    with _own_folders(cfg):
        try:
            training_runner(args, cfg).train()
        except KeyboardInterrupt:
            saved = _find_checkpoint(cfg)
            how = f"continue from {saved.name} with --resume" if saved else "no checkpoint is saved"
            log_warning(f"stopped; {how}")
            raise


@contextmanager
def _own_folders(cfg: Config) -> Iterator[None]:
    """Lock the folders of a run in the main process; if that fails, all processes end."""
    folders = {"--work-dir": Path(cfg.work_dir)}
    checkpoints = _checkpoint_folder(cfg)
    if checkpoints.resolve() != folders["--work-dir"].resolve():
        folders["default_hooks.checkpoint.out_dir"] = checkpoints
    problem: list[str | None] = [None]
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


def training_runner(args: argparse.Namespace, cfg: Config | None = None) -> SafeRunner:
    """Build the runner for the arguments of :func:`training_parser`, and their config if loaded.

    Raises:
        FileNotFoundError: If the config or checkpoint does not exist.
        ValueError: If the work folder contains another run, the config cannot be read or has
            invalid values, or `--auto-scale-lr` is given without a `base_batch_size`.
    """
    cfg = cfg or config_of(args)
    require_dicts(cfg, *OF_TRAINING)
    check_packages(loggers_of(cfg))
    if args.amp == "fp16":
        cfg.optim_wrapper.update(type="AmpOptimWrapper", loss_scale="dynamic", dtype="float16")
    elif args.amp == "bf16":
        cfg.optim_wrapper.type = "BFloat16OptimWrapper"
    if args.amp:
        _add_hook(cfg, "Float32OutputsHook")
    if args.auto_scale_lr:
        if "base_batch_size" not in (cfg.get("auto_scale_lr") or {}):
            raise ValueError("--auto-scale-lr requires auto_scale_lr.base_batch_size in the config")
        cfg.auto_scale_lr.enable = True
    if args.compile:
        _add_hook(cfg, "CompileBackboneHook")
    last = _find_checkpoint(cfg)
    resume = args.resume or (cfg.get("resume") and (cfg.get("load_from") or "auto"))
    if last and not resume:
        raise ValueError(
            f"{last} exists: pass --resume to continue that run, or another --work-dir"
        )
    if resume:
        if Path(resume).is_dir() and resume != "auto":
            raise ValueError(
                f"--resume must be a checkpoint, got the folder {resume}; to continue the run in a "
                f"work folder, pass --work-dir {resume} --resume"
            )
        source = last if resume == "auto" else resume
        if source is None:
            cfg.resume = False  # mmengine would search by itself.
        else:
            cfg.resume, cfg.load_from = True, str(source)
    if cfg.get("load_from") and "backbone" in cfg.model:
        cfg.model.backbone.init_cfg = None  # It would be downloaded and then overwritten.
    runner = build_runner(cfg)
    if resume and source is None:
        log_info(f"no checkpoint in {_checkpoint_folder(cfg)}: starting a new run")
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
