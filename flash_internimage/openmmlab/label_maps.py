"""Data sets of semantic segmentation that are checked before the training begins."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from mmengine.logging import print_log
from mmengine.registry import DATASETS, TRANSFORMS
from mmseg.datasets import ADE20KDataset, BaseSegDataset
from PIL import Image

from .files import DAMAGED, LeftOutFiles, find_missing, read_size

_IGNORED = 255  # in mmseg, of which labels are uint8
_LOOKED_AT = 8  # label maps, at the start


class UnusableLabelMap(ValueError):
    """A label map that is damaged or not of its image's size, which says nothing about others."""


def read_labels(info: dict[str, Any]) -> np.ndarray:
    """The label map of an image as training needs it, (H, W) uint8.

    Args:
        info: what the data sets of this module know about the image.

    Returns:
        the numbers of the classes; 255, or the data set's ignore_index, is to be ignored.

    Raises:
        UnusableLabelMap: it cannot be read.
        ValueError: it has more than one channel, or values that belong to no class.
    """
    path = info["seg_map_path"]
    try:
        with Image.open(path) as image:
            values = np.asarray(image)  # of a palette the indices
    except DAMAGED as error:
        raise UnusableLabelMap(f"label map {path} cannot be read ({error})") from error
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
    """What the values 0 to 255 of a label map become, (256,) int16; -1 is for no class."""
    values = np.arange(256, dtype=np.int16)
    if info["reduce_zero_label"]:
        values = np.where((values == 0) | (values == _IGNORED), _IGNORED, values - 1)
    labels = values.copy()
    for old, new in (info["label_map"] or {}).items():
        labels[values == old] = new
    known = (labels < info["num_classes"]) | np.isin(labels, [_IGNORED, info["ignore_index"]])
    return np.where(known, labels, -1)


class _CheckedLabelMaps:
    """Says at the start what it leaves out and what it cannot use.

    In training, images without a label map are left out and counted. In a test, that is with
    test_mode=True, all must be there and must begin as images of the same size do: a figure from a
    part of them is none. The values of some label maps are looked at in both cases.

    Raises:
        FileNotFoundError: a folder, the ann_file, images or label maps are missing.
        ValueError: classes or label maps cannot be used.
    """

    @classmethod
    def _load_metainfo(cls, metainfo: dict | None = None) -> dict:
        loaded = super()._load_metainfo(metainfo)
        classes = loaded.get("classes", ())
        if isinstance(classes, str) or not 1 <= len(classes) <= _IGNORED:
            raise ValueError(
                f"metainfo['classes'] must be 1 to {_IGNORED} names, of which a single one is "
                f"('bolt',) with a comma, or a file of names, got {classes!r}"
            )
        return loaded

    def load_data_list(self) -> list[dict]:
        for key in ("img_path", "seg_map_path"):
            folder = self.data_prefix.get(key)
            if folder is None or not Path(folder).is_dir():
                raise FileNotFoundError(f"folder not found: data_prefix[{key!r}] is {folder!r}")
        if self.ann_file and not Path(self.ann_file).is_file():
            raise FileNotFoundError(f"ann_file not found: {self.ann_file}")
        data_list = super().load_data_list()
        if not data_list:
            raise FileNotFoundError(f"no images (*{self.img_suffix}) in {self._source}")
        present = self._with_files(data_list)
        if self.test_mode:
            self._check_headers(present)
        for info in present:  # for the transform
            info["num_classes"] = len(self.metainfo["classes"])
            info["ignore_index"] = self.ignore_index
            info["test_mode"] = self.test_mode
        self._report(present, len(data_list) - len(present))
        return present

    @property
    def _source(self) -> str:
        return self.ann_file or self.data_prefix["img_path"]

    def _with_files(self, data_list: list[dict]) -> list[dict]:
        """The images that are there and have a label map; in a test, all of them."""
        keys = ("img_path", "seg_map_path")
        missing = find_missing(info[key] for key in keys for info in data_list)
        present = [info for info in data_list if missing.isdisjoint(info[key] for key in keys)]
        if missing and (self.test_mode or not present):
            first = next(info[key] for info in data_list for key in keys if info[key] in missing)
            raise FileNotFoundError(
                f"{len(data_list) - len(present)} of the {len(data_list)} images of {self._source} "
                f"or their label maps are missing, the first is {first}"
            )
        return present

    def _check_headers(self, data_list: list[dict]) -> None:
        """Which side is the height is left to the pipeline: EXIF may turn images as they load."""
        faults = []
        for info in data_list:
            image, labels = read_size(info["img_path"]), read_size(info["seg_map_path"])
            if image is None or labels is None:
                faults.append(f"{info['seg_map_path' if image else 'img_path']} is damaged")
            elif sorted(image) != sorted(labels):
                faults.append(_differing_sizes(info, labels, image))
        if faults:
            raise ValueError(
                f"{len(faults)} of the {len(data_list)} images of {self._source} or their label "
                f"maps are damaged or differ in size, the first: {faults[0]}"
            )

    def _report(self, data_list: list[dict], left_out: int) -> None:
        """Logs what there is, by label maps from all over the data set."""
        some = data_list[:: -(-len(data_list) // _LOOKED_AT)]
        found: set[int] = set()
        for info in some:
            try:
                found.update(np.unique(read_labels(info)).tolist())
            except UnusableLabelMap:
                if self.test_mode:
                    raise
        found -= {_IGNORED, self.ignore_index}
        classes = len(self.metainfo["classes"])
        doubtful = left_out or len(found) < min(2, classes)
        print_log(
            f"{self._source}: {len(data_list)} images; left out: {left_out} that are missing or "
            f"have no label map; {len(found)} of the {classes} classes occur in {len(some)} label "
            "maps looked at",
            logger="current",
            level=logging.WARNING if doubtful else logging.INFO,
        )


def _differing_sizes(info: dict, labels: tuple[int, ...], image: tuple[int, ...]) -> str:
    return f"label map {info['seg_map_path']} is of (height, width) {labels}, its image of {image}"


@DATASETS.register_module()
class CheckedSegDataset(_CheckedLabelMaps, BaseSegDataset):
    """mmseg's BaseSegDataset, for own data, with the checks of :class:`_CheckedLabelMaps`."""


@DATASETS.register_module()
class CheckedADE20KDataset(_CheckedLabelMaps, ADE20KDataset):
    """mmseg's ADE20KDataset with the checks of :class:`_CheckedLabelMaps`."""


@TRANSFORMS.register_module()
class LoadCheckedAnnotations(BaseTransform):
    """mmseg's LoadAnnotations for label maps that fit their image and the classes.

    In training, a label map that is damaged or not of its image's size is left out, with a warning,
    and the data set draws another image. In a test it is an error, and so, always, are values that
    belong to no class: a GPU would stop at an assertion that names no file. An image without a
    data set, as in mmseg's inference, has no label map.
    """

    def __init__(self) -> None:
        self.left_out = LeftOutFiles()

    def transform(self, results: dict) -> dict | None:
        """
        Args:
            results: what the data sets of this module know about an image, and its ori_shape.

        Raises:
            ValueError: the label map cannot be used.
        """
        if "seg_map_path" not in results:
            return results
        try:
            labels = read_labels(results)
            if labels.shape != tuple(results["ori_shape"]):
                raise UnusableLabelMap(
                    _differing_sizes(results, labels.shape, tuple(results["ori_shape"]))
                )
        except UnusableLabelMap as error:
            if results["test_mode"]:
                raise
            self.left_out.add(results["seg_map_path"], str(error))
            return None
        results["gt_seg_map"] = labels
        results["seg_fields"].append("gt_seg_map")
        return results
