"""COCO datasets that are validated before a run."""

import io
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.registry import DATASETS
from pycocotools import mask as coco_mask

from ...images import UnreadableImage
from ..utils import log_info, log_warning
from .base import ReadableImages
from .coco_annotations import check_annotations, parse_json
from .files import find_missing, is_local
from .transforms import check_size

with redirect_stdout(io.StringIO()):  # mmdet prints which optional packages are missing
    from mmdet.datasets import CocoDataset
    from mmdet.datasets.api_wrappers import COCO
    from mmdet.datasets.transforms import LoadAnnotations

# Metainfo of datasets whose labels follow the order of their classes, not that of the file.
LABELS_FOLLOW_CLASSES = "labels_follow_classes"
_TRACE = 0.01  # Leaving out a larger share is a warning.


class _CheckedCOCO(COCO):
    """COCO index of validated annotations, with categories in the order of the classes."""

    def __init__(self, annotation_file: str, masks: bool) -> None:
        super().__init__()
        self.dataset = parse_json(Path(annotation_file).read_bytes())
        check_annotations(self.dataset, masks)
        self.createIndex()
        self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs

    def get_cat_ids(self, cat_names: Sequence[str], *args: Any, **kwargs: Any) -> list[int]:
        ids = super().get_cat_ids(cat_names, *args, **kwargs)
        given = list(cat_names) if isinstance(cat_names, list | tuple) else None
        if [self.cats[i]["name"] for i in ids] != given:
            raise ValueError(
                "metainfo['classes'] must list categories of the file in their order there, "
                f"{tuple(category['name'] for category in self.cats.values())}, got {cat_names!r}"
            )
        return ids


@DATASETS.register_module()
class CheckedCocoDataset(ReadableImages, CocoDataset):
    """mmdet's CocoDataset, validated before the run starts.

    All annotations are checked. In training, images that are missing or have too many objects, and
    annotations that mmdet does not use, are left out and counted. At test time, all images must
    exist and, according to their headers, have the annotated size: results on only some of them
    would be misleading.

    Args:
        args: Arguments of CocoDataset.
        max_objects: Maximum number of objects per image in training, and at test time if the
            pipeline loads masks. mmdet compares all objects with all anchors, which takes 36 bytes
            per pair: 10 MB per object in an image of 1333 x 800 pixels.
        max_mask_bytes: Maximum size of all masks of an image if the pipeline loads masks. mmdet
            stores one byte per object and pixel.
        kwargs: Keyword arguments of CocoDataset.

    Raises:
        FileNotFoundError: If the annotation file or images are missing, or if test images are
            unreadable or of another size than annotated.
        ValueError: If the annotations are malformed, `metainfo['classes']` does not list categories
            in their order, an object has no mask although the pipeline loads masks, a test image
            has too many objects, or nothing is left to train on.
    """

    def __init__(
        self,
        *args: Any,
        max_objects: int = 2000,
        max_mask_bytes: int = 2**32,
        **kwargs: Any,
    ) -> None:
        for name, value in (("max_objects", max_objects), ("max_mask_bytes", max_mask_bytes)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        self.max_objects = max_objects
        self.max_mask_bytes = max_mask_bytes
        super().__init__(*args, **kwargs)
        # In training, the extra key would keep ConcatDataset from joining it with a CocoDataset.
        if self.test_mode:
            self._metainfo[LABELS_FOLLOW_CLASSES] = True

    def load_data_list(self) -> list[dict]:
        """Load and validate the annotations, and leave out images that cannot be used."""
        local = is_local(self.ann_file, self.backend_args)
        if local and not Path(self.ann_file).is_file():
            raise FileNotFoundError(f"ann_file not found: {self.ann_file}")
        self.counts: Counter[str | None] = Counter()
        self._without_mask: list[str] = []
        self._loads_masks = any(
            isinstance(t, LoadAnnotations) and t.with_mask for t in self.pipeline.transforms
        )
        self.COCOAPI = partial(_CheckedCOCO, masks=self._loads_masks)
        try:
            data_list = super().load_data_list()
        except (ValueError, AssertionError, RecursionError) as error:
            raise ValueError(f"ann_file {self.ann_file}: {error}") from error
        if self._without_mask:
            self._refuse_without_masks(self._without_mask)
        for info in data_list:
            info["test_mode"] = self.test_mode  # read by LoadReadableImage
        return self._with_few_objects(self._with_images(data_list))

    def _refuse_without_masks(self, annotations: list[str]) -> None:
        raise ValueError(
            f"ann_file {self.ann_file}: {annotations[0]}: segmentation must be present, as the "
            f"pipeline loads masks ({len(annotations)} such annotations); for boxes only, remove "
            "with_mask=True from LoadAnnotations in the pipeline and use a model without masks, "
            "such as DINO"
        )

    def parse_data_info(self, raw_data_info: dict) -> dict:
        """Parse the annotations of an image, and count those that mmdet does not use."""
        info = super().parse_data_info(raw_data_info)
        used, annotations = info["instances"], raw_data_info["raw_ann_info"]
        if self._loads_masks and not all("mask" in instance for instance in used):
            for annotation in annotations:
                alone = super().parse_data_info({**raw_data_info, "raw_ann_info": [annotation]})
                if alone["instances"] and "mask" not in alone["instances"][0]:
                    file_name = raw_data_info["raw_img_info"]["file_name"]
                    self._without_mask.append(
                        f"image {info['img_id']} ({file_name}), annotation {annotation['id']}"
                    )
        self.counts["annotations"] += len(annotations)
        for annotation in annotations:
            self.counts[self._doubt(annotation, info)] += 1
        return info

    def _doubt(self, annotation: dict, info: dict) -> str | None:
        """Return why mmdet does not use an annotation, or what seems wrong with it."""
        x, y, width, height = annotation["bbox"]
        right, bottom = x + width, y + height
        if annotation.get("ignore"):
            return "ignored"
        if annotation["area"] <= 0 or width < 1 or height < 1:
            return "without area"
        if min(right, info["width"]) <= max(x, 0) or min(bottom, info["height"]) <= max(y, 0):
            return "outside"
        if annotation["category_id"] not in self.cat_ids:
            return "of other categories"
        if min(x, y) < -1 or right > info["width"] + 1 or bottom > info["height"] + 1:
            return "beyond"
        if self._loads_masks and _misses_box(annotation, info["height"], info["width"]):
            return "displaced"
        return "wrong area" if annotation["area"] > 1.01 * width * height + 1 else None

    def _with_images(self, data_list: list[dict]) -> list[dict]:
        """Return the images whose files exist, requiring all of them at test time."""
        local = [i for i in data_list if is_local(i["img_path"], self.backend_args)]
        missing = find_missing(info["img_path"] for info in local)
        faults = {path: f"{path} does not exist" for path in missing}
        if self.test_mode:
            for info in local:
                path, declared = info["img_path"], (info["height"], info["width"])
                if path in faults:
                    continue
                try:
                    check_size(path, declared)
                except UnreadableImage as error:
                    faults[path] = str(error)
        present = [info for info in data_list if info["img_path"] not in faults]
        if faults and (self.test_mode or not present):
            first = next(info["img_path"] for info in data_list if info["img_path"] in faults)
            raise FileNotFoundError(
                f"{len(data_list) - len(present)} of the {len(data_list)} images of "
                f"{self.ann_file} are missing, unreadable or of another size, the first: "
                f"{faults[first]}"
            )
        self.counts["missing"] = len(data_list) - len(present)
        return present

    def _with_few_objects(self, data_list: list[dict]) -> list[dict]:
        """Return the images whose objects fit into memory, requiring all of them at test time."""
        if self.test_mode and not self._loads_masks:
            return data_list
        kept: list[dict] = []
        crowded: list[dict] = []
        for info in data_list:
            objects = len(info["instances"])
            mask_bytes = self._loads_masks * objects * info["height"] * info["width"]
            fits = objects <= self.max_objects and mask_bytes <= self.max_mask_bytes
            (kept if fits else crowded).append(info)
        if crowded:
            info = crowded[0]
            message = (
                f"{self.ann_file}: {len(crowded)} images have more objects than "
                f"max_objects={self.max_objects} or masks larger than "
                f"max_mask_bytes={self.max_mask_bytes}, the first: {info['img_path']} with "
                f"{len(info['instances'])} objects, {info['width']} x {info['height']} pixels"
            )
            if self.test_mode:
                raise ValueError(
                    f"{message}; raise the limit or remove LoadAnnotations from the test pipeline"
                )
            log_warning(message)
        self.counts["crowded"] = len(crowded)
        return kept

    def filter_data(self) -> list[dict]:
        """Filter the images as mmdet does, and log what is left out.

        Raises:
            ValueError: If nothing is left to train on.
        """
        kept = super().filter_data()
        counts = self.counts
        smallest = (self.filter_cfg or {}).get("min_size", 0)
        left_out = len(self.data_list) - len(kept)
        small = sum(min(info["height"], info["width"]) < smallest for info in self.data_list)
        small = min(small, left_out)  # Nothing is filtered at test time.
        crowds = sum(instance["ignore_flag"] for info in kept for instance in info["instances"])
        objects = sum(len(info["instances"]) for info in kept) - crowds
        reasons = [counts[r] for r in ("outside", "without area", "of other categories", "ignored")]
        summary = (
            f"{len(kept)} images, {objects} objects and {crowds} crowds; left out: "
            f"{counts['missing']} missing images, {counts['crowded']} with too many objects, "
            f"{left_out - small} without objects and {small} smaller than min_size; {reasons[0]} "
            f"annotations outside their image, {reasons[1]} without an area or a pixel, "
            f"{reasons[2]} of other categories and {reasons[3]} with ignore=1"
        )
        if not self.test_mode and not objects:
            raise ValueError(f"nothing to train on in {self.ann_file}: {summary}")
        many = not self.test_mode and (
            left_out > _TRACE * len(self.data_list) or sum(reasons) > _TRACE * counts["annotations"]
        )
        warns = many or counts["missing"] or counts["crowded"]
        (log_warning if warns else log_info)(f"{self.ann_file}: {summary}")
        for doubt, meaning in (
            ("beyond", "extend beyond their image: are their boxes [x, y, width, height]?"),
            (
                "displaced",
                "have a mask that hardly overlaps their box: are its polygons [x1, y1, x2, y2, "
                "...] in pixels, its run lengths by columns?",
            ),
            ("wrong area", "have an area larger than their box"),
        ):
            if counts[doubt] > _TRACE * counts["annotations"]:
                log_warning(
                    f"{self.ann_file}: {counts[doubt]} of the {counts['annotations']} annotations "
                    f"{meaning}"
                )
        return kept


def _misses_box(annotation: dict, height: int, width: int) -> bool:
    """Return whether the bounding box of a mask and its annotated box have an IoU below 0.1."""
    mask = annotation.get("segmentation")
    if not mask:
        return False
    if isinstance(mask, dict):
        rle = (
            mask if isinstance(mask["counts"], str) else coco_mask.frPyObjects(mask, height, width)
        )
        bounds = coco_mask.toBbox(rle).tolist()
    else:
        polygons = [polygon for polygon in mask if len(polygon) >= 6]  # mmdet drops the others.
        lowest = [min(min(polygon[i::2]) for polygon in polygons) for i in (0, 1)]
        highest = [max(max(polygon[i::2]) for polygon in polygons) for i in (0, 1)]
        bounds = [*lowest, highest[0] - lowest[0], highest[1] - lowest[1]]
    # Polygons may connect pixel centers, so each side may be 1 longer.
    (x, y, w, h), (left, top, box_width, box_height) = bounds, annotation["bbox"]
    across = min(x + w, left + box_width) - max(x, left) + 1
    down = min(y + h, top + box_height) - max(y, top) + 1
    shared = max(across, 0) * max(down, 0)
    return 11 * shared < (w + 1) * (h + 1) + (box_width + 1) * (box_height + 1)
