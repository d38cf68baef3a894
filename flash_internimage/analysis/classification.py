"""Report on a classifier: accuracy per class, confusions and the most confident mistakes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch import Tensor
from torch.utils.data import IterableDataset

from ..classification.config import Data
from ..classification.data import SKIPPED, denormalize
from ..classification.evaluation import prepare_evaluation, run_evaluation
from ..drawing import contact_sheet
from .charts import bar_chart, confusion_chart, top_confusions
from .report import Report, escape


@dataclass(frozen=True)
class Mistake:
    """A wrong prediction.

    Attributes:
        confidence: Probability of the predicted class.
        label: Index of the true class.
        predicted: Index of the predicted class.
        image: (H, W, 3) uint8 array, the image as the model saw it.
    """

    confidence: float
    label: int
    predicted: int
    image: np.ndarray


class Predictions:
    """Collects the prediction for every readable image of an evaluation.

    Args:
        settings: Settings of the data, to undo the normalization.
        count: Number of mistakes whose images are kept.
    """

    def __init__(self, settings: Data, count: int) -> None:
        self.settings = settings
        self.count = count
        self.seen = 0
        self.mistakes: list[Mistake] = []  # most confident first
        self._parts: list[tuple[np.ndarray, ...]] = []

    def __call__(self, images: Tensor, targets: Tensor, logits: Tensor) -> None:
        """Add a batch; see :data:`~flash_internimage.classification.evaluation.Observer`."""
        readable = targets != SKIPPED
        positions = self.seen + torch.nonzero(readable).flatten().cpu().numpy()
        self.seen += len(targets)
        images, labels = images[readable], targets[readable].cpu().numpy()
        scores, ranked = logits.softmax(1).topk(min(5, logits.shape[1]))
        best, confidence = ranked[:, 0].cpu().numpy(), scores[:, 0].cpu().numpy()
        in_top5 = (ranked.cpu().numpy() == labels[:, None]).any(1)
        self._parts.append((positions, labels, best, confidence, in_top5))
        wrong = np.flatnonzero(best != labels)
        for i in wrong[np.argsort(-confidence[wrong], kind="stable")][: self.count]:
            if len(self.mistakes) == self.count:
                if confidence[i] <= self.mistakes[-1].confidence:
                    break
                self.mistakes.pop()
            pixels = (255 * denormalize(images[i], self.settings)).round().astype(np.uint8)
            found = Mistake(float(confidence[i]), int(labels[i]), int(best[i]), pixels)
            self.mistakes.append(found)
            self.mistakes.sort(key=lambda mistake: -mistake.confidence)

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Return positions in the dataset's order, labels, classes, confidences and top-5 hits.

        All are (n,) arrays over the readable images.
        """
        return tuple(np.concatenate(part) for part in zip(*self._parts, strict=True))


def analyze_classifier(
    model: str, folder: Path, *, pictures: int = 24, **settings: Any
) -> dict[str, Any]:
    """Evaluate a classifier and write a report.

    Args:
        model: Name of a timm model, or path of a training configuration (`*.yaml`).
        folder: Folder of the report, which exists.
        pictures: Number of mistakes in the contact sheet.
        settings: Arguments of :func:`~flash_internimage.classification.evaluate_checkpoint`.

    Returns:
        The result of :func:`~flash_internimage.classification.evaluate_checkpoint`.

    Raises:
        ValueError: If an argument, model or dataset cannot be used, or a result is not finite.
        OSError: If a file cannot be read or written.
        TooManyCorruptImages: If more images than `data.max_corrupt` cannot be read.
    """
    prepared = prepare_evaluation(model, **settings)
    predictions = Predictions(prepared.settings, pictures)
    figures = run_evaluation(prepared, settings.get("checkpoint"), predictions)
    dataset: Any = prepared.loader.dataset
    positions, *arrays = predictions.arrays()
    if isinstance(dataset, IterableDataset):
        files = [f"number {i}" for i in positions]
    else:
        indices = list(prepared.loader.sampler)
        files = [dataset.name_of(indices[i]) for i in positions]
    write_report(folder, figures, prepared.names, files, arrays, predictions.mistakes)
    return figures


def write_report(
    folder: Path,
    figures: dict[str, Any],
    names: Sequence[str],
    files: Sequence[str],
    arrays: Sequence[np.ndarray],
    mistakes: Sequence[Mistake],
) -> None:
    """Write the report of a classifier.

    Args:
        folder: Folder of the report, which exists.
        figures: Result of the evaluation.
        names: Class names.
        files: Name of each image.
        arrays: Label, predicted class, confidence and top-5 hit of each image, (n,) each.
        mistakes: Mistakes to show, most confident first.
    """
    labels, predicted, confidence, in_top5 = arrays
    classes = range(len(names))
    matrix = confusion_matrix(labels, predicted, labels=classes)
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=classes, zero_division=np.nan
    )
    hits = np.bincount(labels, weights=in_top5, minlength=len(names))
    accuracy = np.where(support, 100 * recall, np.nan)
    top5 = np.where(support, 100 * hits / np.maximum(support, 1), np.nan)
    rows = [
        (names[i], support[i], accuracy[i], top5[i], 100 * precision[i], 100 * f1[i])
        for i in np.argsort(accuracy, kind="stable")
    ]
    confusions = [
        (names[true], names[wrong], matrix[true, wrong], 100 * matrix[true, wrong] / support[true])
        for true, wrong in top_confusions(matrix)
    ]
    mean = float(np.nanmean(accuracy))
    report = Report(folder, f"{escape(str(figures['model']))}: classification")
    report.add_figures({**figures, "mean_class_accuracy": round(mean, 4)})
    if missing := int((support == 0).sum()):
        report.add_text(f"{missing} of the {len(names)} classes have no images.")
    report.add_table(
        "Classes with the lowest accuracy", "classes.csv",
        ("class", "images", "top-1 (%)", "top-5 (%)", "precision (%)", "F1 (%)"), rows,
    )  # fmt: skip
    report.add_chart("Accuracy per class", "class_accuracy.png",
                     bar_chart(names, accuracy, "top-1 accuracy (%)", mean))  # fmt: skip
    report.add_table(
        "Most frequent confusions", "confusions.csv",
        ("true class", "predicted class", "images", "share of the true class (%)"), confusions,
    )  # fmt: skip
    report.add_chart("Confusion matrix", "confusion_matrix.png", confusion_chart(matrix, names))
    order = np.argsort(-confidence, kind="stable")
    wrong = [i for i in order if predicted[i] != labels[i]]
    report.add_table(
        "Most confident mistakes", "mistakes.csv",
        ("image", "true class", "predicted class", "confidence (%)"),
        [(files[i], names[labels[i]], names[predicted[i]], 100 * confidence[i]) for i in wrong],
    )  # fmt: skip
    if mistakes:
        captions = [
            f"true: {names[m.label]}\npredicted ({100 * m.confidence:.0f} %): {names[m.predicted]}"
            for m in mistakes
        ]
        sheet = contact_sheet([m.image for m in mistakes], captions, columns=6, cell_width=160)
        report.add_picture("The images of these mistakes", "mistakes.png", sheet)
    report.add_matrix(matrix, names)
    report.write()
