"""What a run leaves to look at: metrics.csv, TensorBoard, curves.png and predictions.png."""

import csv
import itertools
import logging
import os
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from torch.utils.tensorboard import SummaryWriter

from .config import Data
from .data import SKIPPED, denormalize, spread

_logger = logging.getLogger(__name__)


class Metrics:
    """One row per epoch, in metrics.csv and TensorBoard.

    Epochs count from 1. A run that resumes after `start_epoch` drops the rows that an earlier
    attempt wrote beyond it.
    """

    def __init__(self, output: Path, start_epoch: int = 0):
        self.path = output / "metrics.csv"
        self.rows = [row for row in _read(self.path) if int(row["epoch"]) <= start_epoch]
        self.writer = SummaryWriter(output / "tensorboard", purge_step=start_epoch + 1)

    def add(self, row: dict[str, float]) -> None:
        self.rows.append(row)
        partial = self.path.with_suffix(".partial")
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(partial, self.path)
        for name, value in row.items():
            self.writer.add_scalar(name, value, global_step=row["epoch"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def _read(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def save_curves(metrics_csv: Path, to: Path) -> None:
    """Draws losses, accuracies and the learning rate of a metrics.csv over the epochs."""
    rows = _read(metrics_csv)
    epochs = [int(row["epoch"]) for row in rows]
    panels = {
        "loss": ["train_loss", "val_loss", "ema_loss"],
        "top-1 accuracy (%)": ["val_top1", "ema_top1"],
        "learning rate": ["lr"],
    }
    figure = Figure(figsize=(14, 4), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        for name in names:
            if rows and name in rows[-1]:
                axis.plot(epochs, [float(row[name]) for row in rows], label=name)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(to, dpi=120)


@torch.inference_mode()
def save_predictions(
    model: nn.Module, dataset: Dataset, data: Data, names: list[str], to: Path, count: int = 32
) -> None:
    """Draw images of a data set with the model's predictions, mistakes in red.

    The images are evenly spaced, those of a stream its first ones; unreadable ones are left out.
    """
    model.eval()
    device = next(model.parameters()).device
    if isinstance(dataset, IterableDataset):
        samples = list(itertools.islice(dataset, count))
    else:
        samples = [dataset[i] for i in spread(len(dataset), count)]
    samples = [(torch.as_tensor(image), label) for image, label in samples if label != SKIPPED]
    if not samples:
        _logger.warning("%s is not drawn: no image could be read", to)
        return
    images = torch.stack([image for image, _ in samples])
    confidence, predicted = model(images.to(device)).float().softmax(1).cpu().max(1)
    columns = 8
    rows = -(-len(samples) // columns)
    figure = Figure(figsize=(1.7 * columns, 2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, (axis, (image, label)) in enumerate(zip(axes.flat, samples, strict=False)):
        right = int(predicted[i]) == label
        title = f"{_short(names[predicted[i]])} ({100 * confidence[i]:.0f} %)"
        axis.imshow(denormalize(image, data))
        axis.set_title(
            title if right else f"{title}\nis {_short(names[label])}",
            fontsize=8,
            color="green" if right else "red",
            parse_math=False,  # a class may be called $x^
        )
    figure.savefig(to, dpi=120)


def _short(name: str) -> str:
    """Return a class name as a picture can show it."""
    text = "".join(c if c.isprintable() else "?" for c in name)
    return text if len(text) <= 24 else f"{text[:23]}…"
