"""Check datasets for semantic segmentation."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from ..drawing import draw_label_map
from ..images import UnreadableImage, read_size
from ..openmmlab.datasets.files import find_missing
from ..openmmlab.datasets.label_maps import IGNORED, read_labels
from ..openmmlab.datasets.segmentation import CheckedSegDataset
from ..openmmlab.datasets.transforms import LoadCheckedAnnotations, LoadCheckedImage
from ..predictions import LabelMap
from .check import Findings, Options, choose
from .duplicates import difference_hash
from .report import Report, Split
from .scanning import scan

if TYPE_CHECKING:
    _Base = CheckedSegDataset
else:
    _Base = object


class _Listing(_Base):
    """Mixin of CheckedSegDataset that lists all files where the dataset counts them.

    It leaves out what training leaves out, also in datasets for testing, and leaves the label maps
    to :func:`_read_files`, which reads all of them.
    """

    report: Report
    split: Split
    entries: list[dict]

    def _with_files(self, data_list: list[dict]) -> list[dict]:
        self.split.images = len(data_list)
        self.split.classes = tuple(self.metainfo["classes"])
        paths = [info[key] for info in data_list for key in ("img_path", "seg_map_path")]
        missing = find_missing(paths)
        for key, kind in (("img_path", "missing images"), ("seg_map_path", "missing label maps")):
            absent = [info[key] for info in data_list if info[key] in missing]
            self.report.add(self.split.name, kind, (f"{path} does not exist" for path in absent))
        return super()._with_files(data_list)

    def _unlisted(self, data_list: list[dict]) -> tuple[list[str], list[str]]:
        skipped, unused = super()._unlisted(data_list)
        self.report.add(self.split.name, "images that are not regular files", skipped)
        self.report.add(self.split.name, "label maps without an image", unused)
        return skipped, unused

    def _check_values(self, data_list: list[dict]) -> None:
        self.entries = data_list


class _Contents(NamedTuple):
    size: tuple[int, int] | None  # (height, width)
    pixels: np.ndarray | None  # (256,), number of pixels of each class
    hash: int | None
    faults: list[tuple[str, object]]  # kind, message


def check_label_maps(
    kind: type[CheckedSegDataset],
    arguments: dict[str, Any],
    split: Split,
    findings: Findings,
    options: Options,
) -> None:
    """Check a split of images and label maps.

    Args:
        kind: Class of the dataset.
        arguments: Its arguments in the config.
        split: Receives the counts.
        findings: Receives faults, hashes and pictures.
        options: What to check.

    Raises:
        ValueError: If training refuses the data; faults that can be listed do not raise errors.
        FileNotFoundError: Likewise.
    """
    report = findings.report
    split.unit = "pixels"
    prefix = arguments.get("data_prefix", {})
    split.source = str(Path(arguments.get("data_root") or "", prefix.get("img_path") or ""))
    faults = len(report.faults)
    listed: Any = type("Listing", (_Listing, kind), {"report": report, "split": split})
    changes = {"test_mode": False, "serialize_data": False}
    try:
        dataset = listed(**{**arguments, **changes})
    except FileNotFoundError:
        if len(report.faults) > faults:  # All images or label maps are missing.
            return
        raise
    usable = _read_files(dataset.entries, split, findings, options)
    if usable:
        # Logs and refuses what concerns the dataset as a whole.
        kind._check_values(dataset, usable)
    if options.pictures:
        _draw(usable, split, findings)


def _read_files(
    entries: list[dict], split: Split, findings: Findings, options: Options
) -> list[dict]:
    """Read images and label maps, and return the entries without faults."""
    usable = []
    hashes = findings.hashes.setdefault(split.name, {})

    def read(info: dict) -> _Contents:
        return _read(info, options)

    for info, contents in zip(entries, scan(read, entries, split.name), strict=True):
        for kind, message in contents.faults:
            findings.report.add(split.name, kind, [message])
        split.paths.append(info["img_path"])
        if contents.size:
            split.sizes[contents.size] += 1
        if contents.hash is not None:
            hashes[info["img_path"]] = contents.hash
        if contents.pixels is not None:
            pixels = contents.pixels[: len(split.classes)].tolist()
            found = [(name, n) for name, n in zip(split.classes, pixels, strict=True) if n]
            split.counts.update(dict(found))
            split.images_with.update(name for name, _ in found)
            if not found:
                split.empty.append(Path(info["img_path"]).name)
        if not contents.faults:
            usable.append(info)
    return usable


def _read(info: dict, options: Options) -> _Contents:
    """Read the files of an entry as the transforms of training do."""
    info = {**info, "test_mode": True, "seg_fields": []}  # unusable files are errors
    faults: list[tuple[str, object]] = []
    size = pixels = image_hash = None
    try:
        if options.decode:
            info = LoadCheckedImage()(info)
            if options.similar is not None:
                image_hash = difference_hash(Image.fromarray(info["img"][..., ::-1]))
        else:
            info["ori_shape"] = read_size(info["img_path"])
        size = tuple(info["ori_shape"])
    except UnreadableImage as error:
        faults.append(("unreadable images", error))
        info["ori_shape"] = None
    try:
        # Without its image, its size cannot be compared.
        labels = LoadCheckedAnnotations()(info)["gt_seg_map"] if size else read_labels(info)
        pixels = np.bincount(labels.ravel(), minlength=IGNORED + 1)[:IGNORED]
    except UnreadableImage as error:
        # A label map of another size than its image is also "unreadable".
        faults.append(("unreadable label maps, or of another size than their image", error))
    except ValueError as error:
        faults.append(("label values", error))
    return _Contents(size, pixels, image_hash, faults)


def _draw(entries: list[dict], split: Split, findings: Findings) -> None:
    for i in choose(len(entries)):
        info = {**entries[i], "test_mode": True, "seg_fields": []}
        image = LoadCheckedImage()(info)["img"]
        labels = LabelMap(read_labels(entries[i]), split.classes)
        picture = draw_label_map(np.ascontiguousarray(image[..., ::-1]), labels)
        findings.add_picture(picture, f"{split.name}: {Path(info['img_path']).name}")
