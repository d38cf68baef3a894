"""Report on a detector: precision-recall curves, average precision per class and worst images."""

from .. import openmmlab  # noqa: F401, I001  before anything imports mmcv.ops

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmdet.evaluation import CocoMetric
from mmengine.config import Config
from tqdm import tqdm

from ..drawing import contact_sheet, draw_detections, side_by_side
from ..images import UnreadableImage
from ..predictions import Detections
from ..openmmlab.cli.common import build_runner
from ..openmmlab.utils import log_warning, unwrap_dataset
from .charts import CELL, LINES, bar_chart, lowest, precision_recall_chart
from .coco import Curves, Matches, evaluate_curves, match_boxes
from .images import read_as_annotated
from .report import Report, relative, write_table

_TITLES = {"bbox": "Boxes", "segm": "Masks"}


def analyze_detector(
    cfg: Config, folder: Path, *, pictures: int = 12, score_threshold: float = 0.3
) -> dict[str, Any]:
    """Evaluate a detector and write a report.

    Args:
        cfg: Config of an evaluation, from `prepare_evaluation`.
        folder: Folder of the report, which exists.
        pictures: Number of images in each contact sheet.
        score_threshold: Score below which detections are not drawn and do not count as false.

    Returns:
        The metrics of the evaluation.

    Raises:
        ValueError: If the config has no COCO metric of boxes or masks.
        OSError: If a file cannot be read or written.
    """
    runner = build_runner(cfg)
    metric = _coco_metric(runner.test_loop.evaluator.metrics)
    metric.outfile_prefix = str(folder / "predictions")
    metrics = runner.test()
    truth = metric._coco_api.dataset
    names = {category["id"]: category["name"] for category in truth["categories"]}
    results = {
        kind: json.loads((folder / f"predictions.{kind}.json").read_text())
        for kind in metric.metrics
    }
    paths = {}
    for dataset in unwrap_dataset(runner.test_loop.dataloader.dataset):
        for i in range(len(dataset)):
            info = dataset.get_data_info(i)
            paths[info["img_id"]] = info["img_path"]
    write_report(
        folder,
        metrics,
        truth,
        results,
        categories={i: names[i] for i in metric.cat_ids},
        images=list(metric.img_ids),
        paths=paths,
        title=Path(cfg.filename or "detector").stem,
        pictures=pictures,
        score_threshold=score_threshold,
        thresholds=metric.iou_thrs,
        max_detections=metric.proposal_nums,
    )
    return metrics


def _coco_metric(metrics: Sequence[Any]) -> CocoMetric:
    found = next((metric for metric in metrics if isinstance(metric, CocoMetric)), None)
    if found is None:
        given = ", ".join(type(metric).__name__ for metric in metrics)
        raise ValueError(f"test_evaluator must contain a CocoMetric, got {given}")
    if not {*found.metrics} <= {*_TITLES} or found.format_only:
        raise ValueError(
            f"metric of test_evaluator must be 'bbox' or 'segm', got {found.metrics!r}"
            f"{' with format_only=True' * found.format_only}"
        )
    return found


def write_report(
    folder: Path,
    metrics: Mapping[str, Any],
    truth: Mapping[str, Any],
    results: Mapping[str, list[dict[str, Any]]],
    *,
    categories: Mapping[int, str],
    images: Sequence[Any],
    paths: Mapping[Any, str],
    title: str,
    pictures: int = 12,
    score_threshold: float = 0.3,
    **settings: Any,
) -> None:
    """Write the report of a detector.

    Args:
        folder: Folder of the report, which exists.
        metrics: Metrics of the evaluation.
        truth: Content of the COCO annotation file.
        results: Contents of COCO result files, by 'bbox' and 'segm'.
        categories: Names of the classes by category id.
        images: Ids of the evaluated images.
        paths: Path of each image by its id.
        title: Name of the model.
        pictures: Number of images in each contact sheet.
        score_threshold: Score below which detections are not drawn and do not count as false.
        settings: `thresholds` and `max_detections` of :func:`~.coco.evaluate_curves`.
    """
    chosen = {"categories": list(categories), "images": images}
    curves = {
        kind: evaluate_curves(truth, detections, kind, **chosen, **settings)
        for kind, detections in results.items()
    }
    # Masks are drawn and matched by their boxes.
    boxes = results.get("bbox", results.get("segm", []))
    matches = match_boxes(truth, boxes, **chosen, score_threshold=score_threshold)
    report = Report(folder, f"{title}: detection")
    report.add_figures(metrics)
    _add_classes(report, curves, matches, categories)
    for kind, one in curves.items():
        _add_curves(report, kind, one, list(categories.values()))
    _add_images(report, matches, paths, score_threshold)
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    sources = {i: (paths[i], sizes[i]) for i in images}
    for which, description in (("missed", "missed objects"), ("false", "false boxes")):
        _add_sheet(report, which, description, matches, sources, categories, pictures)
    report.write()


def _add_classes(
    report: Report,
    curves: Mapping[str, Curves],
    matches: Mapping[Any, Matches],
    categories: Mapping[int, str],
) -> None:
    counts = {i: np.zeros(4, int) for i in categories}  # objects, missed, detections, false
    for one in matches.values():
        for annotation, is_found in zip(one.truth, one.found, strict=True):
            counts[annotation["category_id"]] += (1, not is_found, 0, 0)
        for detection, is_correct in zip(one.detections, one.correct, strict=True):
            counts[detection["category_id"]] += (0, 0, 1, not is_correct)
    header = ["class", "objects", "missed", "detections", "false"]
    columns = []
    for kind, curve in curves.items():
        header += [f"{kind} {name}" for name in ("AP (%)", "AP50 (%)", "AP75 (%)", "AR (%)")]
        columns += [curve.average_precision(threshold) for threshold in (None, 0.5, 0.75)]
        columns.append(curve.recall.mean(0))
    rows = [
        (name, *counts[i].tolist(), *(100 * column[k] for column in columns))
        for k, (i, name) in enumerate(categories.items())
    ]
    rows.sort(key=lambda row: (np.isnan(row[5]), row[5]))
    report.add_table("Classes with the lowest average precision", "classes.csv", header, rows)
    if without := sum(counts[i][0] == 0 for i in categories):
        report.add_text(f"{without} of the {len(categories)} classes have no objects.")


def _add_curves(report: Report, kind: str, curves: Curves, names: list[str]) -> None:
    title = _TITLES[kind]
    average = 100 * curves.average_precision()
    with_objects = ~np.isnan(average)
    if not with_objects.any():
        report.add_text(f"{title}: no class has objects, so that there are no curves.")
        return
    report.add_chart(
        f"{title}: average precision per class", f"{kind}_class_ap.png",
        bar_chart(names, average, "AP (%)", float(np.nanmean(average))),
    )  # fmt: skip
    per_iou = {
        f"IoU {threshold:.2f}": precision[:, with_objects].mean(1)
        for threshold, precision in zip(curves.thresholds, curves.precision, strict=True)
    }
    report.add_chart(
        f"{title}: precision and recall per IoU", f"{kind}_precision_recall.png",
        precision_recall_chart(curves.recalls, per_iou, "mean over the classes", ordered=True),
    )  # fmt: skip
    at = int(np.argmin(abs(curves.thresholds - 0.5)))
    shown = lowest(average, LINES)
    which = f"the {len(shown)} classes with the lowest AP"
    if len(shown) == len(names):
        shown, which = np.arange(len(names)), "all classes"
    per_class = {names[i]: curves.precision[at, :, i] for i in shown}
    report.add_chart(
        f"{title}: precision and recall per class", f"{kind}_class_precision_recall.png",
        precision_recall_chart(
            curves.recalls, per_class, f"IoU {curves.thresholds[at]:.2f}, {which}"
        ),
    )  # fmt: skip
    name = f"{kind}_precision_recall.csv"
    write_table(
        report.folder / name,
        ("class", "iou", "recall", "precision"),
        (
            (names[k], round(float(threshold), 4), round(float(recall), 4), precision)
            for k in np.flatnonzero(with_objects)
            for t, threshold in enumerate(curves.thresholds)
            for recall, precision in zip(curves.recalls, curves.precision[t, :, k], strict=True)
        ),
    )
    report.add_text(f"All curves are in [{name}]({name}).")


def _add_images(
    report: Report,
    matches: Mapping[Any, Matches],
    paths: Mapping[Any, str],
    score_threshold: float,
) -> None:
    rows = [
        (relative(paths[i], "."), len(one.truth), one.missed, len(one.detections), one.false)
        for i, one in matches.items()
    ]
    rows.sort(key=lambda row: -(row[2] + row[4]))
    report.add_table(
        "Images with the most errors", "images.csv",
        ("image", "objects", "missed", "detections", "false"), rows,
    )  # fmt: skip
    report.add_text(
        f"Boxes with scores of at least {score_threshold:g} count as detections. An object is "
        "found if one of them has the same class and an IoU of at least 0.5; the others are false."
    )


def _add_sheet(
    report: Report,
    which: str,
    description: str,
    matches: Mapping[Any, Matches],
    sources: Mapping[Any, tuple[str, tuple[int, int]]],
    categories: Mapping[int, str],
    count: int,
) -> None:
    worst = sorted(matches, key=lambda i: -getattr(matches[i], which))[:count]
    worst = [i for i in worst if getattr(matches[i], which)]
    drawn, captions = [], []
    for i in tqdm(worst, desc=f"draw {which}", leave=False, disable=None):
        one = matches[i]
        try:
            image = read_as_annotated(*sources[i])
        except UnreadableImage as error:
            log_warning(f"not drawn: {error}")
            continue
        truth = draw_detections(
            image,
            _detections(one.truth, one.found, "missed", categories),
            caption="Ground truth",
            min_width=CELL // 2,
        )
        prediction = draw_detections(
            image,
            _detections(one.detections, one.correct, "false", categories),
            caption="Prediction",
            min_width=CELL // 2,
        )
        drawn.append(side_by_side([truth, prediction]))
        captions.append(
            f"{Path(sources[i][0]).name}\n{one.missed} of {len(one.truth)} missed, "
            f"{one.false} of {len(one.detections)} false"
        )
    if drawn:
        sheet = contact_sheet(drawn, captions, columns=2, cell_width=CELL)
        report.add_picture(f"Images with the most {description}", f"{which}.png", sheet)
    else:
        report.add_text(f"No image has {description}.")


def _detections(
    items: Sequence[Mapping[str, Any]], good: np.ndarray, error: str, categories: Mapping[int, str]
) -> Detections:
    """Return annotations or detections with the errors named as such."""
    boxes = np.array([item["bbox"] for item in items], dtype=np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    names = [categories[item["category_id"]] for item in items]
    texts = [
        name if is_good else f"{error}: {name}" for name, is_good in zip(names, good, strict=True)
    ]
    classes = tuple(dict.fromkeys(texts))
    return Detections.of(
        boxes,
        [classes.index(text) for text in texts],
        classes,
        scores=[item.get("score", np.nan) for item in items],
    )
