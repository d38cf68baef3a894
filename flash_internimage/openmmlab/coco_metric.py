"""COCO metrics whose annotation file is checked before the training begins."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdet.evaluation import CocoMetric, FasterCocoMetric
from mmdet.registry import METRICS as MMDET_METRICS
from mmengine.evaluator import BaseMetric
from mmengine.fileio import get
from mmengine.registry import METRICS

from .annotations import check_annotations, parse_json
from .files import is_local

_OF_CLASS = "_precision"  # how the names of figures of single classes end


class _Checked:
    """Mixin for mmdet's COCO metrics: checks at the start, and figures under the right names.

    Raises:
        FileNotFoundError: The annotation file is missing.
        ValueError: It is malformed or has no annotations to evaluate, an argument does not fit, a
            class is no category of the file, or an image of the data is not in it.
    """

    def __init__(self, ann_file: str | None = None, metric: str | list[str] = "bbox", **kwargs):
        if not isinstance(metric, str | list | tuple):
            raise ValueError(f"metric must be text or a list of text, got {metric!r}")
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
                annotation.setdefault("iscrowd", 0)  # pycocotools needs it

    @property
    def dataset_meta(self) -> dict | None:
        """Class names and other facts about the data set."""
        return self._dataset_meta

    @dataset_meta.setter
    def dataset_meta(self, dataset_meta: dict) -> None:
        BaseMetric.dataset_meta.fset(self, dataset_meta)
        if self._ann_file is not None:
            self._category_ids()

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Add the predictions of a batch."""
        if self._ann_file is not None:
            for sample in data_samples:
                if sample["img_id"] not in self._coco_api.imgs:
                    raise ValueError(
                        f"ann_file of the evaluator {self._ann_file} has no image "
                        f"{sample['img_id']!r}, which the data have: both must use the same file"
                    )
        super().process(data_batch, data_samples)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Compute the metrics from the predictions.

        Returns:
            mmdet's figures, those of single classes last. These are called `{class}_precision`, and
            `bbox_{class}_precision` and `segm_{class}_precision` if boxes and masks are evaluated.
        """
        metrics, figures = self.metrics, {}
        # mmdet would overwrite the boxes' figures of the classes with those of the masks.
        separate = self.classwise and {"bbox", "segm"} <= {*metrics}
        try:
            for self.metrics in [[metric] for metric in metrics] if separate else [metrics]:
                # mmdet takes the classes in the order of the file.
                self.cat_ids = None if self._coco_api is None else self._category_ids()
                prefix = f"{self.metrics[0]}_" if separate else ""
                for name, value in super().compute_metrics(results).items():
                    figures[prefix + name if name.endswith(_OF_CLASS) else name] = value
        finally:
            self.metrics = metrics
        # The first one is what `save_best="auto"` goes by.
        return dict(sorted(figures.items(), key=lambda figure: figure[0].endswith(_OF_CLASS)))

    def results2json(self, results: Sequence[dict], outfile_prefix: str) -> dict[str, str]:
        """Write the predictions as COCO's files have them."""
        files = super().results2json(results, outfile_prefix)
        # The evaluation sorts the categories. mmdet names its figures in the order of cat_ids.
        self.cat_ids = sorted(self.cat_ids)
        return files

    def _category_ids(self) -> list[int]:
        ids = {category["name"]: i for i, category in self._coco_api.cats.items()}
        classes: Any = (self.dataset_meta or {}).get("classes")
        if not isinstance(classes, list | tuple) or not {*classes} <= ids.keys():
            raise ValueError(
                f"ann_file of the evaluator {self._ann_file}: metainfo['classes'] must list "
                f"categories of the file, {(*ids,)}, got {classes!r:.500}"
            )
        return [ids[name] for name in classes]


@METRICS.register_module()
@MMDET_METRICS.register_module("FasterCocoMetric", force=True)
class CheckedCocoMetric(_Checked, FasterCocoMetric):
    """mmdet's FasterCocoMetric with checks of its annotation file and right names of figures.

    Args:
        ann_file: Annotation file.
        metric: See FasterCocoMetric.
        kwargs: Further arguments of FasterCocoMetric.
    """


@MMDET_METRICS.register_module("CocoMetric", force=True)
class CheckedPycocotoolsMetric(_Checked, CocoMetric):
    """mmdet's CocoMetric with the same checks; `iscrowd` may be missing."""


def _check_for_evaluation(
    ann_file: str, masks: bool, evaluates: bool, backend_args: dict | None
) -> None:
    if is_local(ann_file, backend_args) and not Path(ann_file).is_file():
        raise FileNotFoundError(f"ann_file of the evaluator not found: {ann_file}")
    try:
        content = parse_json(get(ann_file, backend_args=backend_args))
        check_annotations(content, masks, all_masks=masks)
        if evaluates and all(a.get("iscrowd") for a in content.get("annotations", [])):
            raise ValueError("annotations must have objects that are no crowds")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"ann_file of the evaluator {ann_file}: {error}") from error
