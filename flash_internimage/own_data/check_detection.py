"""Check COCO datasets for detection and instance segmentation."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from ..drawing import draw_detections
from ..images import UnreadableImage
from ..openmmlab.datasets.coco import CheckedCocoDataset
from ..openmmlab.datasets.coco_annotations import find_faults, parse_json
from ..openmmlab.datasets.files import find_missing
from ..openmmlab.datasets.transforms import LoadCheckedImage, check_size
from ..predictions import Detections
from .check import Findings, Options, choose
from .duplicates import difference_hash
from .report import Report, Split
from .scanning import scan

# Reasons of CheckedCocoDataset that are faults, and how the report calls them. The others,
# annotations with ignore=1 and those of other categories, are left out on purpose.
_DOUBTS = {
    "outside": "boxes outside of their image",
    "without area": "annotations without an area or a pixel",
    "beyond": "boxes that extend beyond their image",
    "displaced": "masks that hardly overlap their box",
    "wrong area": "areas larger than the box",
}
_DELIBERATE = {"ignored": "annotations with ignore=1", "of other categories": "of other categories"}

if TYPE_CHECKING:
    _Base = CheckedCocoDataset
else:
    _Base = object


class _Listing(_Base):
    """Mixin of CheckedCocoDataset that lists all faults where the dataset counts them.

    It leaves out what training leaves out, also in datasets for testing.
    """

    report: Report
    split: Split
    entries: list[dict]

    def _refuse_without_masks(self, annotations: list[str]) -> None:
        messages = (f"{annotation}: segmentation must be present" for annotation in annotations)
        self.report.add(self.split.name, "objects without a mask", messages)

    def _doubt(self, annotation: dict, info: dict) -> str | None:
        doubt = super()._doubt(annotation, info)
        if doubt in _DOUBTS:
            file_name = Path(info["img_path"]).name
            message = (
                f"image {info['img_id']} ({file_name}, {info['width']} x {info['height']}), "
                f"annotation {annotation['id']}: bbox {annotation['bbox']}, area "
                f"{annotation['area']}"
            )
            self.report.add(self.split.name, _DOUBTS[doubt], [message])
        elif doubt:
            what = _DELIBERATE[doubt]
            self.split.extra[what] = self.split.extra.get(what, 0) + 1
        return doubt

    def _with_images(self, data_list: list[dict]) -> list[dict]:
        self.split.images = len(data_list)
        self.split.sizes.update((info["height"], info["width"]) for info in data_list)
        self.split.classes = tuple(self.metainfo["classes"])
        missing = find_missing(info["img_path"] for info in data_list)
        paths = [info["img_path"] for info in data_list if info["img_path"] in missing]
        self.report.add(
            self.split.name, "missing images", (f"{path} does not exist" for path in paths)
        )
        self.entries = [info for info in data_list if info["img_path"] not in missing]
        return super()._with_images(data_list)


def check_coco(
    kind: type[CheckedCocoDataset],
    arguments: dict[str, Any],
    split: Split,
    findings: Findings,
    options: Options,
) -> None:
    """Check a split in COCO format.

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
    split.source = str(Path(arguments.get("data_root") or "", arguments.get("ann_file", "")))
    if _has_malformed_annotations(arguments, split, report):
        return
    listed: Any = type("Listing", (_Listing, kind), {"report": report, "split": split})
    tests = arguments.get("test_mode", False)
    changes: dict[str, Any] = {"test_mode": False, "serialize_data": False}
    if tests:
        changes["filter_cfg"] = None
    dataset = listed.__new__(listed)
    faults = len(report.faults)
    try:
        dataset.__init__(**{**arguments, **changes})
    except (ValueError, FileNotFoundError):
        # A dataset for testing need not have objects, and missing images are listed already.
        if not (len(report.faults) > faults or (tests and hasattr(dataset, "entries"))):
            raise
    if hasattr(dataset, "entries"):
        _count(dataset.entries, split)
        _read_images(dataset.entries, split, findings, options)
        if options.pictures:
            _draw(dataset.entries, split, findings)


def _has_malformed_annotations(arguments: dict, split: Split, report: Report) -> bool:
    """List the faults of the annotation file, if it can be read at all."""
    path = Path(split.source)
    if not path.is_file():
        return False  # The dataset reports it.
    masks = any(step.get("with_mask") for step in arguments.get("pipeline", ()))
    try:
        faults = find_faults(parse_json(path.read_bytes()), masks)
    except (ValueError, RecursionError):
        return False
    report.add(split.name, "malformed annotations", (f"{path}: {fault}" for fault in faults))
    return bool(faults)


def _count(entries: Iterable[dict], split: Split) -> None:
    crowds = 0
    for info in entries:
        objects = [instance for instance in info["instances"] if not instance["ignore_flag"]]
        names = [split.classes[instance["bbox_label"]] for instance in objects]
        crowds += len(info["instances"]) - len(objects)
        split.counts.update(names)
        split.images_with.update(set(names))
        split.paths.append(info["img_path"])
        if not info["instances"]:
            split.empty.append(Path(info["img_path"]).name)
    split.extra["crowds"] = crowds


def _read_images(entries: list[dict], split: Split, findings: Findings, options: Options) -> None:
    hashes = findings.hashes.setdefault(split.name, {})
    load = LoadCheckedImage()

    def read(info: dict) -> UnreadableImage | int | None:
        size = info["height"], info["width"]
        try:
            if not options.decode:
                check_size(info["img_path"], size)
                return None
            wanted = {"img_path": info["img_path"], "height": size[0], "width": size[1]}
            image = load(wanted)["img"]
        except UnreadableImage as error:
            return error
        if options.similar is None:
            return None
        return difference_hash(Image.fromarray(image[..., ::-1]))

    for info, result in zip(entries, scan(read, entries, split.name), strict=True):
        if isinstance(result, UnreadableImage):
            findings.report.add(split.name, "unreadable images", [result])
        elif result is not None:
            hashes[info["img_path"]] = result


def _draw(entries: list[dict], split: Split, findings: Findings) -> None:
    entries = [info for info in entries if info["instances"]] or entries
    for i in choose(len(entries)):
        info = entries[i]
        try:
            loaded = LoadCheckedImage()({k: info[k] for k in ("img_path", "height", "width")})
        except UnreadableImage:
            continue
        instances = info["instances"]
        masks = None
        if instances and all("mask" in instance for instance in instances):
            size = info["height"], info["width"]
            masks = np.stack([_decode(instance["mask"], *size) for instance in instances])
        annotations = Detections.of(
            [it["bbox"] for it in instances],
            [it["bbox_label"] for it in instances],
            split.classes,
            masks=masks,
        )
        picture = draw_detections(np.ascontiguousarray(loaded["img"][..., ::-1]), annotations)
        name = Path(info["img_path"]).name
        findings.add_picture(picture, f"{split.name}: {name} ({len(instances)})")


def _decode(mask: list | dict, height: int, width: int) -> np.ndarray:
    """Return the mask of an instance, (H, W) bool."""
    if isinstance(mask, list):
        polygons = [polygon for polygon in mask if len(polygon) >= 6]
        mask = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    elif isinstance(mask["counts"], list):
        mask = coco_mask.frPyObjects(mask, height, width)
    return coco_mask.decode(mask).astype(bool)
