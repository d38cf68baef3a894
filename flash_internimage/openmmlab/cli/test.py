"""Command line of the test scripts."""

import argparse
import os
from collections.abc import Iterator
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
        for dataset in _inner_datasets(cfg.test_dataloader.dataset):
            dataset["pipeline"] = cfg.tta_pipeline
        cfg.model = {**cfg.tta_model, "module": cfg.model}
    unused = "train_dataloader", "train_cfg", "optim_wrapper", "param_scheduler", "auto_scale_lr"
    for name in (*unused, "val_dataloader", "val_cfg", "val_evaluator"):
        cfg[name] = None
    hooks = cfg.get("custom_hooks") or []
    cfg.custom_hooks = [hook for hook in hooks if not _stops_training(hook)]
    cfg.load_from = checkpoint
    return cfg


def move_data(cfg: Config, root: Path) -> None:
    """Change the root of the test dataset, and of the annotation files of its evaluator.

    Args:
        cfg: Config, changed in place.
        root: Root of another copy of the dataset.

    Raises:
        ValueError: If the config joins datasets of several roots, or an annotation file of the
            evaluator is outside of them.
    """
    datasets = list(_inner_datasets(cfg.test_dataloader.dataset))
    before = {os.path.normpath(dataset.get("data_root") or "") for dataset in datasets}
    if len(before) > 1:
        raise ValueError(
            f"--data must be left out for datasets of several roots, {', '.join(sorted(before))}, "
            f"got {root}; override test_dataloader.dataset with --cfg-options"
        )
    [old_root] = before
    for dataset in datasets:
        dataset["data_root"] = f"{root}/"
    evaluator = cfg.test_evaluator
    for metric in evaluator if isinstance(evaluator, list | tuple) else [evaluator]:
        if path := metric.get("ann_file"):
            metric["ann_file"] = _moved(path, old_root, root, datasets)


def _moved(path: str, before: str, root: Path, datasets: list[dict]) -> str:
    """Return the path of an annotation file of the evaluator below another root."""
    if len(datasets) == 1 and datasets[0].get("ann_file"):  # whatever the evaluator names
        return os.path.join(root, datasets[0]["ann_file"])
    inside = os.path.relpath(path, before)
    if inside.startswith(os.pardir):
        raise ValueError(
            f"test_evaluator.ann_file must be below data_root={before} for --data, got {path}"
        )
    return os.path.join(root, inside)


def _inner_datasets(dataset: dict) -> Iterator[dict]:
    """Yield the settings of the datasets inside wrappers such as ConcatDataset."""
    if "datasets" in dataset:
        for part in dataset["datasets"]:
            yield from _inner_datasets(part)
    elif "dataset" in dataset:
        yield from _inner_datasets(dataset["dataset"])
    else:
        yield dataset
