"""COCO annotations that are checked before the training begins."""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.datasets.transforms import LoadAnnotations
from mmengine.logging import print_log
from mmengine.registry import DATASETS

from .files import find_missing, read_size


class _OrderedCategories(COCO):
    """The annotations of a file whose categories are the data set's classes, in the same order."""

    def get_cat_ids(self, cat_names: Sequence[str], *args, **kwargs) -> list[int]:
        ids = super().get_cat_ids(cat_names, *args, **kwargs)
        if [self.cats[i]["name"] for i in ids] != list(cat_names):
            raise ValueError(
                "metainfo['classes'] must list categories of the file in their order there, "
                f"{tuple(category['name'] for category in self.cats.values())}, got {cat_names!r}"
            )
        return ids


@DATASETS.register_module()
class CheckedCocoDataset(CocoDataset):
    """mmdet's CocoDataset, which says at the start what it leaves out and what it cannot use.

    In training, images that are not there and annotations that cannot be trained on are left out
    and counted. In a test all images must be there and begin as images do: a figure from a part of
    them is none.

    Raises:
        FileNotFoundError: there is no annotation file, or images are missing.
        ValueError: the annotation file is damaged, its categories are not `metainfo['classes']`, or
            an object has no mask where the pipeline loads masks.
    """

    COCOAPI = _OrderedCategories

    def load_data_list(self) -> list[dict]:
        if not Path(self.ann_file).is_file():
            raise FileNotFoundError(f"ann_file not found: {self.ann_file}")
        self.counts = Counter()
        self._loads_masks = any(
            isinstance(t, LoadAnnotations) and t.with_mask for t in self.pipeline.transforms
        )
        try:
            data_list = super().load_data_list()
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            reason = error if isinstance(error, ValueError) else repr(error)
            raise ValueError(f"ann_file {self.ann_file} cannot be used: {reason}") from error
        return self._with_images(data_list)

    def parse_data_info(self, raw_data_info: dict) -> dict:
        info = super().parse_data_info(raw_data_info)
        used = info["instances"]
        if self._loads_masks and not all("mask" in instance for instance in used):
            raise ValueError(
                f"an object of {info['img_path']} has no segmentation, and the pipeline loads masks"
            )
        crowds = sum(instance["ignore_flag"] for instance in used)
        self.counts["objects"] += len(used) - crowds
        self.counts["crowds"] += crowds
        self.counts["unusable"] += len(raw_data_info["raw_ann_info"]) - len(used)
        return info

    def _with_images(self, data_list: list[dict]) -> list[dict]:
        """The images whose files are there; in a test, all of them."""
        not_there = find_missing(info["img_path"] for info in data_list)
        missing = []
        present = []
        for info in data_list:
            path = info["img_path"]
            # after an epoch's training would be late to find out
            damaged = self.test_mode and read_size(path) is None
            (missing if path in not_there or damaged else present).append(info)
        if missing and (self.test_mode or not present):
            raise FileNotFoundError(
                f"{len(missing)} of the {len(data_list)} images of {self.ann_file} are missing or "
                f"damaged, the first is {missing[0]['img_path']}"
            )
        self.counts["missing"] = len(missing)
        return present

    def filter_data(self) -> list[dict]:
        kept = super().filter_data()
        left_out = len(self.data_list) - len(kept)
        level = logging.WARNING if self.counts["missing"] else logging.INFO
        print_log(
            f"{self.ann_file}: {len(kept)} images, {self.counts['objects']} objects and "
            f"{self.counts['crowds']} crowds; left out: {self.counts['missing']} images that are "
            f"missing, {left_out} that have no objects or are too small, and "
            f"{self.counts['unusable']} annotations without a usable box or of other categories",
            logger="current",
            level=level,
        )
        return kept
