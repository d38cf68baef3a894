"""Semantic segmentation data sets that are checked before the training begins."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from mmengine.logging import print_log
from mmengine.registry import DATASETS, TRANSFORMS
from mmseg.datasets import ADE20KDataset, BaseSegDataset

from ..files import check_no_loops
from ..images import UnreadableImage, read_size
from .files import LeftOutFiles, ReadableImages, find_missing, is_local, open_image

_IGNORED = 255  # mmseg's labels are uint8
_CHECKED_AT_START = 200  # label maps; 512 x 683 pixels take about 4 ms each


def read_labels(info: dict[str, Any]) -> np.ndarray:
    """Read the label map of an image as training needs it.

    Args:
        info: Entry of a data set of this module.

    Returns:
        Class indices, (H, W) uint8; 255 and the data set's ignore_index are to be ignored.

    Raises:
        UnreadableImage: It cannot be read.
        ValueError: It has more than one channel, or values that belong to no class.
    """
    path = info["seg_map_path"]
    values = np.asarray(open_image(path, info["backend_args"]))  # the indices of a palette
    if values.ndim != 2:
        raise ValueError(
            f"label map {path} must have one channel, the numbers of the classes, got an array of "
            f"shape {values.shape}"
        )
    indices = values.astype(np.uint8)
    labels = _label_table(info)[indices]
    wrong = (labels < 0) | (indices != values)
    if wrong.any():
        first, zero = (1, "0 and ") if info["reduce_zero_label"] else (0, "")
        classes = len(info["label_map"] or range(info["num_classes"]))
        raise ValueError(
            f"label map {path} has the values {np.unique(values[wrong])[:10].tolist()}; with "
            f"{classes} classes and reduce_zero_label={info['reduce_zero_label']}, {first} to "
            f"{first + classes - 1} are classes, and {zero}{_IGNORED} to be ignored"
        )
    return labels.astype(np.uint8)


def _label_table(info: dict[str, Any]) -> np.ndarray:
    """Return what the values 0 to 255 of a label map become, (256,) int16; -1 means no class."""
    values = np.arange(256, dtype=np.int16)
    if info["reduce_zero_label"]:
        values = np.where((values == 0) | (values == _IGNORED), _IGNORED, values - 1)
    labels = values.copy()
    for old, new in (info["label_map"] or {}).items():
        labels[values == old] = new
    known = (labels < info["num_classes"]) | np.isin(labels, [_IGNORED, info["ignore_index"]])
    return np.where(known, labels, -1)


class _CheckedLabelMaps(ReadableImages):
    """Mixin for mmseg's data sets with checks at the start.

    In training, images without a label map are left out and counted. In tests (`test_mode=True`)
    all must be there and begin as images of the same size do, since results on a part of them
    would be misleading. The values of up to 200 label maps from all over the data set are checked
    in both cases, those of others when they are read.

    Raises:
        FileNotFoundError: A folder, the ann_file, images or label maps are missing.
        ValueError: Classes or label maps cannot be used.
        OSError: A symbolic link in the folder of the images leads back to a folder above it.
    """

    @classmethod
    def _load_metainfo(cls, metainfo: dict | None = None) -> dict:
        loaded = super()._load_metainfo(metainfo)
        classes = loaded.get("classes", ())
        names = isinstance(classes, list | tuple) and all(isinstance(c, str) for c in classes)
        if not names or not 1 <= len(classes) <= _IGNORED:
            raise ValueError(
                f"metainfo['classes'] must be 1 to {_IGNORED} names, of which a single one is "
                f"('bolt',) with a comma, or a file of names, got {classes!r}"
            )
        return loaded

    def load_data_list(self) -> list[dict]:
        for name, kind in (("reduce_zero_label", bool), ("ignore_index", int)):
            if type(getattr(self, name)) is not kind:
                raise ValueError(f"{name} must be {kind.__name__}, got {getattr(self, name)!r}")
        self._check_sources()
        data_list = super().load_data_list()
        if not data_list:
            raise FileNotFoundError(f"no images (*{self.img_suffix}) in {self.source}")
        present = self._with_files(data_list)
        skipped = self._skipped_by_listing()
        if self.test_mode:
            if skipped:
                raise FileNotFoundError(
                    f"{len(skipped)} images of {self.source} are not regular files, the first is "
                    f"{skipped[0]}"
                )
            self._check_headers(present)
        for info in present:  # for the transforms
            info["num_classes"] = len(self.metainfo["classes"])
            info["ignore_index"] = self.ignore_index
            info["test_mode"] = self.test_mode
            info["backend_args"] = self.backend_args
        self._check_values(present, len(data_list) - len(present) + len(skipped))
        return present

    def _check_sources(self) -> None:
        for key in ("img_path", "seg_map_path"):
            folder = self.data_prefix.get(key)
            if folder is None or (self._is_local(folder) and not Path(folder).is_dir()):
                raise FileNotFoundError(f"folder not found: data_prefix[{key!r}] is {folder!r}")
        if not self.ann_file:
            if self._is_local(self.data_prefix["img_path"]):
                check_no_loops(self.data_prefix["img_path"])
        elif self._is_local(self.ann_file) and not Path(self.ann_file).is_file():
            raise FileNotFoundError(f"ann_file not found: {self.ann_file}")

    def _skipped_by_listing(self) -> list[str]:
        """Return images that the engine's listing of a folder skips, such as broken links."""
        folder = self.data_prefix["img_path"]
        if self.ann_file or not self._is_local(folder):
            return []
        paths = [
            str(Path(parent, name))
            for parent, _, names in os.walk(folder, followlinks=True)
            for name in names
            if name.endswith(self.img_suffix) and not name.startswith(".")
        ]
        return sorted(path for path in paths if not os.path.isfile(path))

    def _is_local(self, path: str) -> bool:
        return is_local(path, self.backend_args)

    def _with_files(self, data_list: list[dict]) -> list[dict]:
        """Return the images that exist and have a label map, in tests all of them."""
        keys = ("img_path", "seg_map_path")
        paths = (info[key] for key in keys for info in data_list)
        missing = find_missing(path for path in paths if self._is_local(path))
        present = [info for info in data_list if missing.isdisjoint(info[key] for key in keys)]
        if missing and (self.test_mode or not present):
            first = next(info[key] for info in data_list for key in keys if info[key] in missing)
            raise FileNotFoundError(
                f"{len(data_list) - len(present)} of the {len(data_list)} images of {self.source} "
                f"or their label maps are missing, the first is {first}"
            )
        return present

    def _check_headers(self, data_list: list[dict]) -> None:
        faults = [fault for info in data_list if (fault := self._header_fault(info))]
        if faults:
            raise ValueError(
                f"{len(faults)} of the {len(data_list)} images of {self.source} or their label "
                f"maps are unreadable or differ in size, the first: {faults[0]}"
            )

    def _header_fault(self, info: dict) -> str | None:
        paths = info["img_path"], info["seg_map_path"]
        if not all(map(self._is_local, paths)):
            return None
        try:
            image, labels = map(read_size, paths)
        except UnreadableImage as error:
            return str(error)
        # The pipeline compares height and width: EXIF may turn images as they are loaded.
        return None if sorted(image) == sorted(labels) else _differing_sizes(info, labels, image)

    def _check_values(self, data_list: list[dict], left_out: int) -> None:
        """Check the values of label maps from all over the data set, and log what there is."""
        some = data_list[:: -(-len(data_list) // _CHECKED_AT_START)]
        counts = np.zeros(256, np.int64)
        unreadable = []
        for info in some:
            try:
                counts += np.bincount(read_labels(info).ravel(), minlength=256)
            except UnreadableImage as error:
                if self.test_mode:
                    raise
                unreadable.append(error)
        if len(unreadable) == len(data_list):
            raise ValueError(
                f"none of the {len(data_list)} label maps of {self.source} can be used, the first: "
                f"{unreadable[0]}"
            )
        found = {*np.flatnonzero(counts).tolist()} - {_IGNORED, self.ignore_index}
        classes = len(self.metainfo["classes"])
        doubtful = left_out or unreadable or len(found) < min(2, classes)
        print_log(
            f"{self.source}: {len(data_list)} images; left out: {left_out} that are missing or "
            f"have no label map; {len(found)} of the {classes} classes occur in {len(some)} label "
            f"maps checked, {len(unreadable)} of them unreadable",
            logger="current",
            level=logging.WARNING if doubtful else logging.INFO,
        )


def _differing_sizes(info: dict, labels: tuple[int, ...], image: tuple[int, ...]) -> str:
    return f"label map {info['seg_map_path']} has (height, width) {labels}, its image has {image}"


@DATASETS.register_module()
class CheckedSegDataset(_CheckedLabelMaps, BaseSegDataset):
    """mmseg's BaseSegDataset, for own data, with the checks of :class:`_CheckedLabelMaps`."""


@DATASETS.register_module()
class CheckedADE20KDataset(_CheckedLabelMaps, ADE20KDataset):
    """mmseg's ADE20KDataset with the checks of :class:`_CheckedLabelMaps`."""


@TRANSFORMS.register_module()
class LoadCheckedAnnotations(BaseTransform):
    """mmseg's LoadAnnotations for label maps that fit their image and the classes.

    In training, a label map that is unreadable or not of its image's size is left out with a
    warning, and the data set draws another image. In tests it is an error. Values that belong to no
    class are always an error: a GPU would stop at an assertion that names no file. An image without
    a data set, as in mmseg's inference, has no label map.

    Args:
        max_left_out: Number of label maps per process up to which the training continues.
    """

    def __init__(self, max_left_out: int = 100):
        self.left_out = LeftOutFiles(max_left_out)

    def transform(self, results: dict) -> dict | None:
        """Add `gt_seg_map` to `results`.

        Args:
            results: Entry of a data set of this module, with the image's `ori_shape`.

        Raises:
            ValueError: The label map cannot be used.
        """
        if "seg_map_path" not in results:
            return results
        try:
            labels = read_labels(results)
            shape = tuple(results["ori_shape"])
            if labels.shape != shape:
                raise UnreadableImage(_differing_sizes(results, labels.shape, shape))
        except UnreadableImage as error:
            if results["test_mode"]:
                raise
            self.left_out.add(results["seg_map_path"], error)
            return None
        results["gt_seg_map"] = labels
        results["seg_fields"].append("gt_seg_map")
        return results
