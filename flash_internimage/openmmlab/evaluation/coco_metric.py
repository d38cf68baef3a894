"""COCO metrics that validate the annotation file, data and model before the run starts."""

import os.path
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmdet.evaluation import CocoMetric, FasterCocoMetric
from mmdet.models import BaseDetector
from mmengine.evaluator import BaseMetric
from mmengine.fileio import get
from mmengine.registry import METRICS
from torch import nn

from ..datasets.coco import LABELS_FOLLOW_CLASSES
from ..datasets.coco_annotations import check_annotations, parse_json
from ..datasets.files import is_local
from ..utils import log_warning, unwrap_model

_OF_CLASS = "_precision"  # suffix of per-class results


class _Checked(CocoMetric):
    """Base of COCO metrics that are validated and name per-class results correctly.

    Images of the annotation file that are not in the data are left out of the evaluation, with a
    warning.

    Raises:
        FileNotFoundError: If the annotation file is missing.
        ValueError: If the annotation file is malformed or has no annotations to evaluate, an
            argument is invalid, a class is not a category of the file, an image of the data is
            not in the file, differs from it in name or size or is evaluated twice, or `metric`
            contains 'segm' for a model without masks.
    """

    metrics: list[str]
    cat_ids: Any

    def __init__(
        self, ann_file: str | None = None, metric: str | list[str] = "bbox", **kwargs: Any
    ) -> None:
        if not isinstance(metric, str | list | tuple):
            raise ValueError(f"metric must be a string or a list of strings, got {metric!r}")
        thresholds = kwargs.get("iou_thrs") or []
        for value in thresholds if isinstance(thresholds, list | tuple) else [thresholds]:
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise ValueError(f"iou_thrs must be numbers from 0 to 1, got {thresholds!r}")
        if ann_file is not None:
            _check_for_evaluation(
                ann_file,
                masks="segm" in metric,
                evaluates=not kwargs.get("format_only"),
                backend_args=kwargs.get("backend_args"),
            )
        self._ann_file = ann_file
        super().__init__(ann_file, metric, **kwargs)
        if ann_file is not None:
            for annotation in self._coco_api.anns.values():
                annotation.setdefault("iscrowd", 0)  # required by pycocotools

    @property
    def dataset_meta(self) -> dict | None:
        """Metainfo of the dataset, such as its class names."""
        return self._dataset_meta

    @dataset_meta.setter
    def dataset_meta(self, dataset_meta: dict) -> None:
        BaseMetric.dataset_meta.fset(self, dataset_meta)
        if self._ann_file is not None:
            self._category_ids(warn=True)

    def check_run(self, model: nn.Module, dataset: Any) -> None:
        """Check that a model can be evaluated on a dataset.

        SafeRunner calls this before the run starts.

        Args:
            model: Model that makes the predictions.
            dataset: Dataset of mmengine, or a wrapper around one or several.

        Raises:
            ValueError: If the model, the data and the annotation file do not match.
        """
        if "segm" in self.metrics and _predicts_boxes_alone(model):
            raise ValueError(self._lacks_masks())
        if not hasattr(dataset, "get_data_info"):
            return
        paths: dict[Any, str | None] = {}
        differing: list[bool] = []
        for i in range(len(dataset)):
            info = dataset.get_data_info(i)
            if "img_id" not in info:
                return
            identity, path = info["img_id"], info.get("img_path")
            self._check_image(identity, path, (info.get("height"), info.get("width")))
            if identity in paths:
                raise ValueError(
                    f"image {identity!r} must be evaluated once, got {paths[identity]} and {path}"
                )
            paths[identity] = path
            boxes = [i["bbox"] for i in info.get("instances", ()) if "bbox" in i]
            if boxes and self._ann_file is not None:
                annotations = self._coco_api.imgToAnns.get(identity, ())
                differing.append(not _contain(annotations, boxes))
        if any(differing):
            message = (
                f"ann_file of the evaluator {self._ann_file} lacks boxes of {sum(differing)} of "
                f"the {len(differing)} images with objects in the data"
            )
            if all(differing):
                raise ValueError(f"{message}: both must use the same file")
            log_warning(message)

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Collect the predictions of a batch.

        Raises:
            ValueError: If an image is not that of the annotation file, or has no masks to evaluate.
        """
        for sample in data_samples:
            self._check_image(sample["img_id"], sample.get("img_path"), sample.get("ori_shape"))
            if "segm" in self.metrics and "masks" not in sample["pred_instances"]:
                raise ValueError(self._lacks_masks())
        super().process(data_batch, data_samples)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Compute the metrics from the collected predictions.

        Returns:
            mmdet's metrics, per-class results last. These are named `{class}_precision`, or
            `bbox_{class}_precision` and `segm_{class}_precision` if both boxes and masks are
            evaluated.
        """
        self.img_ids = self._evaluated_ids(results)
        metrics, figures = self.metrics, {}
        # mmdet would overwrite the per-class results of the boxes with those of the masks.
        separate = self.classwise and {"bbox", "segm"} <= {*metrics}
        try:
            for self.metrics in [[metric] for metric in metrics] if separate else [metrics]:
                self.cat_ids = None if self._coco_api is None else self._category_ids()
                prefix = f"{self.metrics[0]}_" if separate else ""
                for name, value in super().compute_metrics(results).items():
                    figures[prefix + name if name.endswith(_OF_CLASS) else name] = value
        finally:
            self.metrics = metrics
        # `save_best="auto"` uses the first metric.
        return dict(sorted(figures.items(), key=lambda figure: figure[0].endswith(_OF_CLASS)))

    def results2json(self, results: Sequence[dict], outfile_prefix: str) -> dict[str, str]:
        """Write the predictions in COCO's result format."""
        files = super().results2json(results, outfile_prefix)
        # The evaluation sorts the categories, but mmdet names its results in the order of cat_ids.
        self.cat_ids = sorted(self.cat_ids)
        return files

    def _lacks_masks(self) -> str:
        return (
            "metric of the evaluator must not contain 'segm' for a model that predicts no masks, "
            f"got {self.metrics!r}"
        )

    def _check_image(self, identity: Any, path: str | None, shape: Sequence | None) -> None:
        """Check that an image of the data matches the entry of its id in the annotation file."""
        if self._ann_file is None:
            return
        ann_file = f"ann_file of the evaluator {self._ann_file}"
        if identity not in self._coco_api.imgs:
            raise ValueError(
                f"{ann_file} has no image {identity!r}, but the data do: both must use the same "
                "file"
            )
        image = self._coco_api.imgs[identity]
        if path and not _is_file(path, image["file_name"]):
            raise ValueError(
                f"{ann_file}: image {identity!r} is {image['file_name']}, but {path} in the data: "
                "both must use the same file"
            )
        size = image["height"], image["width"]
        if shape and None not in shape and tuple(shape[:2]) != size:
            raise ValueError(
                f"{ann_file}: image {identity!r} ({image['file_name']}) has (height, width) "
                f"{size}, but {tuple(shape[:2])} in the data"
            )

    def _evaluated_ids(self, results: list) -> list:
        """Return the ids of the images with predictions, and warn about the others."""
        ids = [prediction["img_id"] for _, prediction in results]
        for identity, times in Counter(ids).most_common(1):
            if times > 1:
                raise ValueError(f"image {identity!r} must be evaluated once, got {times} results")
        if self._ann_file is not None and (left_out := len(self._coco_api.imgs) - len(ids)):
            log_warning(
                f"{left_out} of the {len(self._coco_api.imgs)} images of {self._ann_file} are not "
                "in the data and are not evaluated"
            )
        return ids

    def _category_ids(self, warn: bool = False) -> list[int]:
        """Return the category ids in the order of the labels."""
        ids = {category["name"]: i for i, category in self._coco_api.cats.items()}
        # mmdet's ConcatDataset has a list if the metainfo of its datasets differs.
        given = self.dataset_meta or {}
        first, *others = given if isinstance(given, list) else [given]
        classes: Any = first.get("classes")
        if (
            not isinstance(classes, list | tuple)
            or not {*classes} <= ids.keys()
            or len({*classes}) < len(classes)
            or any(other.get("classes") != classes for other in others)
        ):
            raise ValueError(
                f"ann_file of the evaluator {self._ann_file}: metainfo['classes'] must list "
                f"categories of the file, {(*ids,)}, got {classes!r:.500}"
            )
        in_file = [name for name in ids if name in classes]
        if first.get(LABELS_FOLLOW_CLASSES):
            return [ids[name] for name in classes]
        if warn and in_file != [*classes]:
            log_warning(
                f"metainfo['classes'] are not in the order of {self._ann_file}: labels are assumed "
                f"to follow the file, as in mmdet's CocoDataset, {(*in_file,)}"
            )
        return [ids[name] for name in in_file]


@METRICS.register_module()
class CheckedCocoMetric(_Checked, FasterCocoMetric):
    """mmdet's FasterCocoMetric, validated before the run, with correctly named per-class results.

    Args:
        ann_file: Path of the annotation file.
        metric: See FasterCocoMetric.
        kwargs: Further arguments of FasterCocoMetric.
    """


@METRICS.register_module()
class CheckedPycocotoolsMetric(_Checked):
    """mmdet's CocoMetric with the same validation. `iscrowd` may be missing."""


def _check_for_evaluation(
    ann_file: str, masks: bool, evaluates: bool, backend_args: dict | None
) -> None:
    if is_local(ann_file, backend_args) and not Path(ann_file).is_file():
        raise FileNotFoundError(f"ann_file of the evaluator not found: {ann_file}")
    try:
        content = parse_json(get(ann_file, backend_args=backend_args))
        check_annotations(content, masks, all_masks=masks)
        if evaluates and all(a.get("iscrowd") for a in content.get("annotations", [])):
            raise ValueError("annotations must contain objects that are not crowds")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"ann_file of the evaluator {ann_file}: {error}") from error


def _predicts_boxes_alone(model: Any) -> bool:
    """Return whether a model is one of mmdet's detectors without any part for masks."""
    model = unwrap_model(model)
    names = (
        # The offset_mask of a DCNv4 layer has nothing to do with object masks.
        f"{name} {type(module).__name__}".replace("offset_mask", "").lower()
        for name, module in model.named_modules()
        if name
    )
    return (
        isinstance(model, BaseDetector)
        and type(model).predict.__module__.startswith("mmdet.")
        and not any("mask" in name for name in names)
    )


def _contain(annotations: Sequence[dict], boxes: list, tolerance: float = 2) -> bool:
    """Return whether the annotations contain all boxes (x1, y1, x2, y2), up to some pixels."""
    known = np.array([a["bbox"] for a in annotations], dtype=float).reshape(-1, 4)
    known[:, 2:] += known[:, :2]
    distance = np.abs(np.array(boxes)[:, None] - known).max(axis=2, initial=0)
    return bool((distance <= tolerance).any(axis=1).all())


def _is_file(path: str, file_name: str) -> bool:
    """Return whether a path ends in a file name, ignoring the extension."""
    path, name = (os.path.splitext(posixpath.normpath(p))[0] for p in (path, file_name))
    return f"/{path}".endswith("/" + re.sub(r"^(\.\./|/)+", "", name))
