"""Check datasets for classification."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..classification.config import Config, ConfigError, load_config
from ..classification.data import (
    SkippingImageDataset,
    build_dataset,
    class_names,
    class_to_index,
    match_classes,
    train_loader,
)
from ..classification.data.datasets import ImageSet, WrongLabel, source_of
from ..classification.data.folders import FolderReader
from ..images import UnreadableImage, read_size
from .check import Findings, Options, choose
from .duplicates import difference_hash
from .report import Notes, Report, Split
from .scanning import scan


class _Contents(NamedTuple):
    size: tuple[int, int]  # (height, width)
    label: int
    hash: int | None


def check_classification(config: Path, options: Options) -> Findings:
    """Check the splits of a classifier's config; see :func:`.check.check_dataset`."""
    overrides = [f"{key}={value}" for key, value in options.overrides.items()]
    cfg = load_config(config, [*overrides, "data.workers=0"])
    findings = Findings(Report(str(config), "classification"))
    train_set = _check_split("train", cfg, None, findings, options)
    _check_split("val", cfg, train_set, findings, options)
    return findings


def _check_split(
    name: str, cfg: Config, train_set: ImageSet | None, findings: Findings, options: Options
) -> ImageSet | None:
    """Check a split, and return its dataset unless training refuses it."""
    data, trains = cfg.data, name == "train"
    folder, batch_size = data.val_split, cfg.val_batch_size
    if trains:
        folder, batch_size = data.train_split, cfg.batch_size
    split = Split(name, str(source_of(data, folder)), "images")
    findings.report.splits.append(split)
    try:
        with _warnings(split.notes):
            dataset = build_dataset(data, folder, trains, batch_size)
            own = class_to_index(dataset)
            split.classes = tuple(sorted(own, key=own.__getitem__))
            if isinstance(dataset, SkippingImageDataset):
                _read_images(dataset, split, findings, options)
            else:
                split.notes.append(f"data.kind={data.kind}: the images of streams are not read")
            if trains:
                class_names(dataset, cfg.model.num_classes)
                train_loader(dataset, cfg, torch.device("cpu"), 0, 1)
            elif train_set is not None and (known := class_to_index(train_set)):
                names = sorted(known, key=known.__getitem__)
                match_classes(dataset, names, f"data.train_split={data.train_split}")
    except ConfigError as error:
        findings.report.add(name, "training refuses", str(error).splitlines())
        return None
    return dataset


@contextmanager
def _warnings(notes: list[str]) -> Iterator[None]:
    """Collect the warnings that training would log."""
    logger, handler = logging.getLogger("flash_internimage.classification"), Notes(notes)
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated


def _read_images(
    dataset: SkippingImageDataset, split: Split, findings: Findings, options: Options
) -> None:
    """Count and read all images; those of tar files in one thread, as they share a file."""
    if isinstance(dataset.reader, FolderReader):
        samples = dataset.reader.samples
        split.paths += [path for path, _ in samples]
        labels = [label for _, label in samples]
    split.images = len(dataset)
    readable: list[int] = []
    hashes = findings.hashes.setdefault(split.name, {})

    def read(index: int) -> _Contents | UnreadableImage | WrongLabel:
        try:
            if not options.decode and split.paths:
                return _Contents(read_size(split.paths[index]), labels[index], None)
            image, label = dataset.read(index)
        except (UnreadableImage, WrongLabel) as error:
            return error
        wanted = options.similar is not None and split.paths
        return _Contents(image.size[::-1], label, difference_hash(image) if wanted else None)

    workers = None if split.paths else 1
    for i, found in enumerate(scan(read, range(len(dataset)), split.name, workers)):
        if not isinstance(found, _Contents):
            kind = "unreadable images" if isinstance(found, UnreadableImage) else "labels"
            findings.report.add(split.name, kind, [found])
            continue
        readable.append(i)
        split.sizes[found.size] += 1
        name = split.classes[found.label] if split.classes else str(found.label)
        split.counts[name] += 1
        if found.hash is not None:
            hashes[split.paths[i]] = found.hash
    if not split.classes:
        split.classes = tuple(sorted(split.counts, key=int))
    unreadable = len(dataset) - len(readable)
    if unreadable > dataset.max_corrupt or not readable:
        findings.report.add(
            split.name,
            "training refuses",
            [
                f"found {unreadable} unreadable images, more than "
                f"data.max_corrupt={dataset.max_corrupt}"
            ],
        )
    if options.pictures:
        _draw(dataset, readable, split, findings)


def _draw(
    dataset: SkippingImageDataset, readable: list[int], split: Split, findings: Findings
) -> None:
    for i in choose(len(readable)):
        try:
            image, label = dataset.read(readable[i])
        except UnreadableImage:  # possible if only headers were read before
            continue
        name = split.classes[label]
        findings.add_picture(np.asarray(image), f"{split.name}: {name}")
