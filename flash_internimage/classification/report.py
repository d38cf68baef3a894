"""Reports of a run: metrics.csv, its loggers, curves.png and predictions.png."""

import contextlib
import csv
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import IterableDataset

from ..files import write_atomically, write_csv
from ..tracking import open_tracker
from ..tracking.events import Events
from .config import Data
from .data import SKIPPED, denormalize, spread
from .data.datasets import ImageSet

_logger = logging.getLogger(__name__)


class Metrics:
    """Metrics of a run in metrics.csv, TensorBoard and other loggers, one row per epoch.

    Epochs count from 1. Rows of an earlier attempt beyond `start_epoch` are dropped.

    Args:
        output: Output folder of the run.
        start_epoch: Number of epochs done so far.
        loggers: Names in :data:`flash_internimage.tracking.TRACKERS`.
        settings: Settings of the run, which these loggers show.
        resumed: Whether the run continues an earlier attempt.
    """

    def __init__(
        self,
        output: Path,
        start_epoch: int = 0,
        loggers: Sequence[str] = (),
        settings: dict[str, Any] | None = None,
        resumed: bool = False,
    ) -> None:
        self.path = output / "metrics.csv"
        self.rows = [row for row in _read(self.path) if int(row["epoch"]) <= start_epoch]
        with contextlib.ExitStack() as stack:  # closes what is open if another cannot be opened

            def opened(one: Any) -> Any:
                return stack.enter_context(contextlib.closing(one))

            self.trackers = [
                opened(open_tracker(name, output, settings or {}, resumed)) for name in loggers
            ]
            self.events = opened(Events(output / "tensorboard", purge_step=start_epoch + 1))
            self._opened = stack.pop_all()

    def add(self, row: dict[str, Any]) -> None:
        """Add the row of an epoch.

        Raises:
            OSError: If a file cannot be written.
        """
        self.rows.append(row)
        # Resuming may add or remove columns, such as those of the EMA.
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        write_csv(self.path, [names, *([row.get(name) for name in names] for row in self.rows)])
        self.events.add(row, row["epoch"])
        for tracker in self.trackers:
            tracker.log(row, row["epoch"])

    def close(self) -> None:
        """Close the TensorBoard file and the other loggers."""
        self._opened.close()


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.csv, except damaged ones."""
    if not path.exists():
        return []
    with open(path, newline="", errors="replace") as file:
        rows = list(csv.DictReader(file))
    whole = [row for row in rows if (row.get("epoch") or "").isdecimal() and None not in row]
    if len(whole) < len(rows):
        _logger.warning("ignored %d damaged rows of %s", len(rows) - len(whole), path)
    return whole


def speed(images_per_second: float) -> str:
    """Format images per second; values below 1 have two significant digits."""
    return f"{images_per_second:{'.1f' if images_per_second >= 1 else '.2g'}}"


def _number(text: str | None) -> float:
    """Return the number in a cell, NaN if the epoch has none."""
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


def _save_figure(figure: Figure, to: Path) -> None:
    write_atomically(to, lambda file: figure.savefig(file, dpi=120, format="png"))


def save_curves(metrics_csv: Path, to: Path) -> None:
    """Plot the losses, accuracies and learning rate in a metrics.csv over the epochs."""
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
            if any(row.get(name) for row in rows):
                axis.plot(epochs, [_number(row.get(name)) for row in rows], label=name)
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
        axis.legend()
    _save_figure(figure, to)


@torch.inference_mode()
def save_predictions(
    model: nn.Module, dataset: ImageSet, data: Data, names: list[str], to: Path, count: int = 32
) -> None:
    """Draw images of a dataset with the model's predictions, mistakes in red.

    Unreadable images are skipped.

    Args:
        model: Classifier.
        dataset: Dataset with the evaluation transform.
        data: Settings of the data, to undo the normalization.
        names: Class names of the model, in the order of its outputs.
        to: Destination of the PNG file.
        count: Number of images, evenly spaced, or the first ones of a stream.
    """
    model.eval()
    device = next(model.parameters()).device
    if isinstance(dataset, IterableDataset):
        samples = list(itertools.islice(dataset, count))
    else:
        samples = [dataset[i] for i in spread(len(dataset), count)]
    samples = [(torch.as_tensor(image), label) for image, label in samples if label != SKIPPED]
    if not samples:
        _logger.warning("cannot draw %s: no image could be read", to)
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
            parse_math=False,  # class names may contain $ and ^
        )
    _save_figure(figure, to)


def _short(name: str) -> str:
    """Return a class name shortened to 24 printable characters."""
    text = "".join(c if c.isprintable() else "?" for c in name)
    return text if len(text) <= 24 else f"{text[:23]}…"
