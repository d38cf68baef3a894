"""Check the datasets of detectors and segmentors."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, METRICS, DefaultScope

from ..images import image_suffixes
from ..openmmlab.cli.config import load_config
from ..openmmlab.datasets.base import ReadableImages
from ..openmmlab.errors import describe, is_users
from ..openmmlab.safe_loading import safe_loading
from .check import Findings, Options
from .report import Notes, Report, Split

_TASKS = {"mmdet": "detection", "mmseg": "segmentation"}


def check_openmmlab(config: Path, options: Options) -> Findings:
    """Check the datasets of a config of mmdet or mmseg; see :func:`.check.check_dataset`."""
    cfg = load_config(config, options.overrides, option="--set")
    task = _TASKS.get(cfg.get("default_scope", ""))
    if task is None:
        raise ValueError(
            f"{config}: default_scope must be mmdet or mmseg, got {cfg.get('default_scope')!r}"
        )
    findings = Findings(Report(str(config), task))
    with (
        DefaultScope.overwrite_default_scope(cfg.default_scope),
        safe_loading(),
        redirect_stdout(io.StringIO()),  # pycocotools prints its progress
    ):
        for name, kind, arguments in list(_datasets(cfg)):
            _check_split(name, kind, arguments, findings, options)
        for name in ("val", "test"):
            _check_evaluator(name, cfg, findings)
    if task == "detection":
        _count_unlisted(findings)
    return findings


def _datasets(cfg: Config) -> Iterator[tuple[str, type, dict]]:
    """Yield the name, class and arguments of each dataset of a config, without wrappers."""
    seen: list[Any] = []
    for name in ("train", "val", "test"):
        loader = cfg.get(f"{name}_dataloader")
        dataset = loader.get("dataset") if isinstance(loader, Mapping) else None
        if dataset is None or dataset in seen:
            continue
        seen.append(dataset)
        parts = list(_parts(dataset))
        for i, part in enumerate(parts, start=1):
            yield (f"{name} {i}" if len(parts) > 1 else name, *_class_of(part, name))
    if not seen:
        raise ValueError("the config must have a train_dataloader or val_dataloader with a dataset")


def _parts(dataset: Mapping) -> Iterator[Mapping]:
    if "datasets" in dataset:
        for part in dataset["datasets"]:
            yield from _parts(part)
    elif "dataset" in dataset:
        yield from _parts(dataset["dataset"])
    else:
        yield dataset


def _class_of(dataset: Mapping, name: str) -> tuple[type, dict]:
    arguments = {key: value for key, value in dataset.items() if key != "_scope_"}
    kind = arguments.pop("type", None)
    if isinstance(kind, str):
        scope = dataset.get("_scope_") or DefaultScope.get_current_instance().scope_name
        with DATASETS.switch_scope_and_registry(scope) as registry:
            kind = registry.get(kind)
    if not (isinstance(kind, type) and issubclass(kind, ReadableImages)):
        raise ValueError(
            f"{name}_dataloader.dataset.type must be CheckedCocoDataset, CheckedSegDataset or "
            f"CheckedADE20KDataset, got {dataset.get('type')!r}"
        )
    return kind, arguments


def _check_split(
    name: str, kind: type, arguments: dict, findings: Findings, options: Options
) -> None:
    from ..openmmlab.datasets.segmentation import CheckedSegDataset

    if issubclass(kind, CheckedSegDataset):
        from .check_segmentation import check_label_maps as check
    else:
        from .check_detection import check_coco as check
    split = Split(name, "-", "objects")
    findings.report.splits.append(split)
    faults = len(findings.report.faults)
    with _warnings(split.notes), _refusals(name, findings.report):
        check(kind, arguments, split, findings, options)
    if arguments.get("test_mode") and len(findings.report.faults) == faults:
        # At test time, datasets refuse what they leave out of training.
        split.notes.clear()
        with _warnings(split.notes), _refusals(name, findings.report):
            kind(**arguments)


@contextmanager
def _refusals(split: str, report: Report) -> Iterator[None]:
    """Report the errors with which training would end."""
    try:
        yield
    except Exception as error:
        if not is_users(error):
            raise
        report.add(split, "training refuses", [describe(error)])


@contextmanager
def _warnings(notes: list[str]) -> Iterator[None]:
    """Collect the warnings that a dataset logs in training."""
    name = "flash_internimage.own_data"
    logger = MMLogger.get_instance(name, log_level="WARNING")  # the current one from here on
    logger.handlers = [Notes(notes)]
    try:
        yield
    finally:
        del MMLogger._instance_dict[name]


def _check_evaluator(name: str, cfg: Config, findings: Findings) -> None:
    """Check the annotation file of the evaluator, unless its dataset has faults already."""
    evaluator = cfg.get(f"{name}_evaluator")
    if name == "test" and evaluator == cfg.get("val_evaluator"):
        return
    if any(fault.split.startswith(name) for fault in findings.report.faults):
        return
    for metric in evaluator if isinstance(evaluator, list | tuple) else [evaluator]:
        if isinstance(metric, Mapping) and metric.get("ann_file"):
            with _refusals(f"{name}_evaluator", findings.report):
                METRICS.build(metric)


def _count_unlisted(findings: Findings) -> None:
    """Note the images in the folders of a split that no annotation file lists."""
    used = {Path(path).resolve() for split in findings.report.splits for path in split.paths}
    suffixes = image_suffixes()
    for split in findings.report.splits:
        folders = {Path(path).parent for path in split.paths}
        unused = [
            path
            for folder in sorted(folders)
            for path in sorted(folder.iterdir())
            if path.suffix.lower() in suffixes and path.resolve() not in used
        ]
        if unused:
            split.notes.append(
                f"{len(unused)} images in the folders of this split are in no annotation file, the "
                f"first: {unused[0]}"
            )
