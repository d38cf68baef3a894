"""Average precision and matched boxes, as COCO's evaluation computes them.

The arrays are those of faster-coco-eval, which evaluates in training and testing; the matches are
pycocotools', which faster-coco-eval does not return.
"""

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import faster_coco_eval
import numpy as np
import pycocotools.coco
import pycocotools.cocoeval

# Thresholds of COCO's average precision.
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
ALL_AREAS, MOST_DETECTIONS = 0, -1  # indices into the arrays


@dataclass(frozen=True)
class Curves:
    """Precision and recall of all classes.

    Attributes:
        thresholds: (T,) IoU thresholds.
        recalls: (R,) recalls at which the precision is given.
        precision: (T, R, classes), NaN for classes without objects.
        recall: (T, classes), the highest recall; NaN for classes without objects.
    """

    thresholds: np.ndarray
    recalls: np.ndarray
    precision: np.ndarray
    recall: np.ndarray

    def average_precision(self, threshold: float | None = None) -> np.ndarray:
        """Return the average precision of each class, NaN for classes without objects.

        Args:
            threshold: IoU threshold; None for the mean over all.
        """
        if threshold is None:
            return self.precision.mean((0, 1))
        chosen = np.isclose(self.thresholds, threshold)
        if not chosen.any():
            return np.full(self.precision.shape[2], np.nan)
        return self.precision[chosen].mean((0, 1))


@dataclass(frozen=True)
class Matches:
    """The objects and detections of an image, matched at an IoU of 0.5.

    Attributes:
        truth: Annotations, without crowds.
        found: (len(truth),) bool, whether a detection of the same class matches.
        detections: Detections in COCO's result format, best first; without those in crowds.
        correct: (len(detections),) bool, whether they match an object.
    """

    truth: list[dict[str, Any]]
    found: np.ndarray
    detections: list[dict[str, Any]]
    correct: np.ndarray

    @property
    def missed(self) -> int:
        """Number of objects without a detection."""
        return int((~self.found).sum())

    @property
    def false(self) -> int:
        """Number of detections without an object."""
        return int((~self.correct).sum())


def evaluate_curves(
    truth: Mapping[str, Any],
    detections: Sequence[dict[str, Any]],
    kind: str,
    *,
    categories: Sequence[int],
    images: Sequence[Any],
    thresholds: Sequence[float] | np.ndarray = IOU_THRESHOLDS,
    max_detections: Sequence[int] = (100, 300, 1000),
) -> Curves:
    """Evaluate detections.

    Args:
        truth: Content of a COCO annotation file.
        detections: Content of a COCO result file.
        kind: 'bbox' or 'segm'.
        categories: Ids of the categories, in the order of the classes.
        images: Ids of the images.
        thresholds: IoU thresholds.
        max_detections: Numbers of detections per image; the largest counts.

    Returns:
        Precision and recall over objects of all sizes.
    """
    coco = _index(faster_coco_eval.COCO, truth)
    # With the box, the area of a mask would be that of its box.
    unused = {"bbox"} if kind == "segm" else {"segmentation"}
    results = [{k: v for k, v in one.items() if k not in unused} for one in detections]
    evaluation = faster_coco_eval.COCOeval_faster(coco, _load(coco, results), kind)
    evaluation.params.catIds = list(categories)
    evaluation.params.imgIds = list(images)
    evaluation.params.iouThrs = np.asarray(thresholds, dtype=float)
    evaluation.params.maxDets = list(max_detections)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    # The evaluation sorts the categories.
    columns = np.searchsorted(np.unique(categories), categories)
    precision = evaluation.eval["precision"][:, :, columns, ALL_AREAS, MOST_DETECTIONS]
    recall = evaluation.eval["recall"][:, columns, ALL_AREAS, MOST_DETECTIONS]
    return Curves(
        evaluation.params.iouThrs,
        np.asarray(evaluation.params.recThrs),
        np.where(precision < 0, np.nan, precision),
        np.where(recall < 0, np.nan, recall),
    )


def match_boxes(
    truth: Mapping[str, Any],
    detections: Iterable[dict[str, Any]],
    *,
    categories: Sequence[int],
    images: Sequence[Any],
    score_threshold: float,
) -> dict[Any, Matches]:
    """Match boxes with objects of the same class at an IoU of 0.5, best score first.

    Args:
        truth: Content of a COCO annotation file.
        detections: Content of a COCO result file.
        categories: Ids of the categories.
        images: Ids of the images.
        score_threshold: Score below which detections do not count.

    Returns:
        The matches of each image by its id.
    """
    coco = _index(pycocotools.coco.COCO, truth)
    kept = [
        {key: value for key, value in one.items() if key != "segmentation"}
        for one in detections
        if one["score"] >= score_threshold
    ]
    results = _load(coco, kept)
    evaluation = pycocotools.cocoeval.COCOeval(coco, results, "bbox")
    parameters = evaluation.params
    parameters.catIds, parameters.imgIds = list(categories), list(images)
    parameters.iouThrs = np.array([0.5])
    parameters.areaRng, parameters.areaRngLbl = parameters.areaRng[:1], parameters.areaRngLbl[:1]
    parameters.maxDets = [len(kept) + 1]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
    objects: dict[Any, list[tuple[dict, bool]]] = {image: [] for image in images}
    found: dict[Any, list[tuple[dict, bool]]] = {image: [] for image in images}
    for one in evaluation.evalImgs:
        if one is None:  # neither objects nor detections
            continue
        for i, match, is_ignored in zip(
            one["gtIds"], one["gtMatches"][0], one["gtIgnore"], strict=True
        ):
            if not is_ignored:
                objects[one["image_id"]].append((coco.anns[i], match > 0))
        for i, match, is_ignored in zip(
            one["dtIds"], one["dtMatches"][0], one["dtIgnore"][0], strict=True
        ):
            if not is_ignored:
                found[one["image_id"]].append((results.anns[i], match > 0))
    matches = {}
    for image in images:
        found[image].sort(key=lambda one: -one[0]["score"])
        matches[image] = Matches(
            [annotation for annotation, _ in objects[image]],
            np.array([is_found for _, is_found in objects[image]], dtype=bool),
            [detection for detection, _ in found[image]],
            np.array([is_correct for _, is_correct in found[image]], dtype=bool),
        )
    return matches


def _index(kind: type, content: Mapping[str, Any]) -> Any:
    """Return the content of an annotation file, in which `iscrowd` may be missing, as a COCO."""
    coco = kind()
    annotations = [{"iscrowd": 0, **annotation} for annotation in content["annotations"]]
    coco.dataset = {**content, "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _load(coco: Any, detections: list[dict[str, Any]]) -> Any:
    """Return detections as an instance of COCO, which loadRes does for at least one."""
    if not detections:
        return _index(type(coco), {**coco.dataset, "annotations": []})
    with contextlib.redirect_stdout(io.StringIO()):
        return coco.loadRes(detections)
