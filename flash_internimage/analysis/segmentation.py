"""Report on a segmentor: IoU per class, confusions of pixels, and the worst images."""

from .. import openmmlab  # noqa: F401, I001  before anything imports mmcv.ops

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmseg.evaluation import IoUMetric

from ..drawing import contact_sheet, draw_label_map, side_by_side
from ..images import UnreadableImage
from ..predictions import LabelMap
from ..openmmlab.cli.common import build_runner
from ..openmmlab.utils import log_warning
from .charts import CELL, bar_chart, confusion_chart, top_confusions
from .images import read_as_annotated
from .report import Report, relative


@dataclass(frozen=True)
class ImageResult:
    """The pixels of an image, without ignored ones.

    Attributes:
        path: Path of the image.
        intersection: (classes,) pixels whose class is predicted correctly.
        truth: (classes,) pixels of each class.
        predicted: (classes,) pixels of each predicted class.
    """

    path: str
    intersection: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray

    @property
    def iou(self) -> np.ndarray:
        """(classes,) IoU; NaN for classes that are neither in the image nor predicted."""
        return ratio(self.intersection, self.truth + self.predicted - self.intersection)

    @property
    def mean_iou(self) -> float:
        """Mean IoU of the classes that are in the image or predicted; NaN if all is ignored."""
        return mean(self.iou)


@dataclass(frozen=True)
class WorstImage:
    """An image with a low IoU: its result, and label maps (H, W) of its truth and prediction."""

    result: ImageResult
    truth: np.ndarray
    predicted: np.ndarray


class PixelConfusion(BaseMetric):
    """Counts the pixels of each pair (true class, predicted class).

    Args:
        ignore_index: Label of pixels that do not count.
        count: Number of images with the lowest IoU whose label maps are kept.
    """

    def __init__(self, ignore_index: int, count: int) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        self.count = count
        self.matrix = np.zeros((0, 0), dtype=np.int64)
        self.images: list[ImageResult] = []
        self.worst: list[WorstImage] = []  # lowest IoU first

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Count the pixels of a batch."""
        classes = len(self.dataset_meta["classes"])
        if not self.matrix.size:
            self.matrix = np.zeros((classes, classes), dtype=np.int64)
        for sample in data_samples:
            predicted, truth = (
                sample[name]["data"].squeeze().cpu().numpy().astype(np.int64)
                for name in ("pred_sem_seg", "gt_sem_seg")
            )
            matrix = count_pixels(truth, predicted, classes, self.ignore_index)
            self.matrix += matrix
            result = ImageResult(sample["img_path"], np.diag(matrix), matrix.sum(1), matrix.sum(0))
            self.images.append(result)
            self._keep(WorstImage(result, truth, predicted))
            self.results.append(None)  # mmengine warns about metrics without results

    def _keep(self, image: WorstImage) -> None:
        if np.isnan(image.result.mean_iou):
            return
        self.worst.append(image)
        self.worst.sort(key=lambda one: one.result.mean_iou)
        del self.worst[self.count :]

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Return nothing: the figures are those of IoUMetric."""
        return {}


def count_pixels(
    truth: np.ndarray, predicted: np.ndarray, classes: int, ignore_index: int
) -> np.ndarray:
    """Return the confusion matrix of two label maps, the true classes in rows.

    Args:
        truth: Label map of integers.
        predicted: Predicted label map of the same shape.
        classes: Number of classes.
        ignore_index: Label in `truth` of pixels that do not count; nor do those without a class.

    Returns:
        (classes, classes) int64 array.
    """
    counted = (truth != ignore_index) & (truth < classes) & (predicted < classes)
    pairs = classes * truth[counted] + predicted[counted]
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return a ratio of counts, NaN where the whole is 0."""
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def mean(values: np.ndarray) -> float:
    """Return the mean of the numbers that are not NaN; NaN without any."""
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")


def analyze_segmentor(cfg: Config, folder: Path, *, pictures: int = 12) -> dict[str, Any]:
    """Evaluate a segmentor and write a report.

    Args:
        cfg: Config of an evaluation, from `prepare_evaluation`.
        folder: Folder of the report, which exists.
        pictures: Number of images in the contact sheet.

    Returns:
        The metrics of the evaluation.

    Raises:
        ValueError: If the config has no IoUMetric.
        OSError: If a file cannot be read or written.
    """
    runner = build_runner(cfg)
    evaluator = runner.test_loop.evaluator
    iou = next((metric for metric in evaluator.metrics if isinstance(metric, IoUMetric)), None)
    if iou is None or iou.format_only:
        raise ValueError(
            f"test_evaluator must contain an IoUMetric, got {_names(evaluator.metrics)}"
            f"{' with format_only=True' * (iou is not None)}"
        )
    confusion = PixelConfusion(iou.ignore_index, pictures)
    confusion.dataset_meta = evaluator.dataset_meta
    evaluator.metrics.append(confusion)
    metrics = runner.test()
    title = Path(cfg.filename or "segmentor").stem
    write_report(folder, metrics, confusion, iou.ignore_index, title)
    return metrics


def _names(metrics: Sequence[Any]) -> str:
    return ", ".join(type(metric).__name__ for metric in metrics)


def write_report(
    folder: Path,
    metrics: Mapping[str, Any],
    confusion: PixelConfusion,
    ignore_index: int,
    title: str,
) -> None:
    """Write the report of a segmentor.

    Args:
        folder: Folder of the report, which exists.
        metrics: Metrics of the evaluation.
        confusion: The metric that has counted the pixels.
        ignore_index: Label of pixels that do not count.
        title: Name of the model.
    """
    names = list(confusion.dataset_meta["classes"])
    matrix = confusion.matrix
    hits, truth, predicted = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    iou = 100 * ratio(hits, truth + predicted - hits)
    columns = [iou, 100 * ratio(hits, truth), 100 * ratio(hits, predicted)]
    present = np.sum([image.truth > 0 for image in confusion.images], axis=0)
    rows = [
        (names[i], present[i], truth[i], *(column[i] for column in columns))
        for i in np.argsort(iou, kind="stable")
    ]
    report = Report(folder, f"{title}: segmentation")
    report.add_figures(metrics)
    report.add_table(
        "Classes with the lowest IoU", "classes.csv",
        ("class", "images", "pixels", "IoU (%)", "accuracy (%)", "precision (%)"), rows,
    )  # fmt: skip
    if missing := int((truth == 0).sum()):
        report.add_text(f"{missing} of the {len(names)} classes are in no image.")
    report.add_chart("IoU per class", "class_iou.png",
                     bar_chart(names, iou, "IoU (%)", mean(iou)))  # fmt: skip
    report.add_table(
        "Most frequent confusions", "confusions.csv",
        ("true class", "predicted class", "pixels", "share of the true class (%)"),
        [
            (names[i], names[k], matrix[i, k], 100 * matrix[i, k] / truth[i])
            for i, k in top_confusions(matrix)
        ],
    )  # fmt: skip
    report.add_chart("Confusion matrix", "confusion_matrix.png", confusion_chart(matrix, names))
    report.add_matrix(matrix, names)
    images = sorted(confusion.images, key=lambda image: (np.isnan(image.mean_iou), image.mean_iou))
    report.add_table(
        "Images with the lowest IoU", "images.csv", ("image", "mean IoU (%)", "accuracy (%)"),
        [
            (
                relative(image.path, "."),
                100 * image.mean_iou,
                100 * image.intersection.sum() / max(image.truth.sum(), 1),
            )
            for image in images
        ],
    )  # fmt: skip
    drawn, captions = [], []
    for one in confusion.worst:
        try:
            image = read_as_annotated(one.result.path, one.truth.shape[:2])
        except UnreadableImage as error:
            log_warning(f"not drawn: {error}")
            continue
        drawn.append(
            side_by_side(
                [
                    draw_label_map(
                        image,
                        LabelMap(labels, tuple(names)),
                        caption=caption,
                        min_width=CELL // 2,
                        ignore=ignore_index,
                    )
                    for labels, caption in (
                        (one.truth, "Ground truth"),
                        (one.predicted, "Prediction"),
                    )
                ]
            )
        )
        captions.append(f"{Path(one.result.path).name}\nmean IoU {100 * one.result.mean_iou:.1f} %")
    if drawn:
        sheet = contact_sheet(drawn, captions, columns=2, cell_width=CELL)
        report.add_picture("Images with the lowest IoU", "worst.png", sheet)
    report.write()
