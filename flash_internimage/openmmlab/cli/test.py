"""Command line of the test scripts."""

import argparse
from pathlib import Path
from typing import Any

from mmengine.config import Config

from ...files import require_writable
from .common import base_parser
from .config import config_of


def evaluation_parser(program: str, description: str) -> argparse.ArgumentParser:
    """Return an argument parser with the arguments that all test scripts share."""
    parser = base_parser(program, description)
    parser.add_argument("checkpoint", help="path or URL; published checkpoints are converted")
    return parser


def _stops_training(hook: Any) -> bool:
    """Return whether a hook is an EarlyStoppingHook, which requires a training loop."""
    kind: Any = hook.get("type") if isinstance(hook, dict) else type(hook)
    return (kind if isinstance(kind, str) else kind.__name__).endswith("EarlyStoppingHook")


def evaluation_config(args: argparse.Namespace, tta: bool = False) -> Config:
    """Return the config for the arguments of :func:`evaluation_parser`.

    See :func:`prepare_evaluation`.

    Raises:
        FileNotFoundError: If the config does not exist.
        OSError: If the work folder cannot be written.
        ValueError: If the config cannot be read or an option is unknown.
    """
    return prepare_evaluation(config_of(args), args.checkpoint, tta)


def prepare_evaluation(cfg: Config, checkpoint: str, tta: bool = False) -> Config:
    """Change a config in place to evaluate a checkpoint.

    Args:
        cfg: Config, with a work folder and a launcher.
        checkpoint: Path or URL of the checkpoint.
        tta: Run multi-scale testing with flips, as configured in `tta_model`.

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
