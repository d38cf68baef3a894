"""Compare the training curves of several runs, of any task, in one chart or table."""

import csv
import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ..scalars import is_finite, is_number, read_rows
from .charts import label, palette
from .report import save_figure, write_table

_logger = logging.getLogger(__name__)

CHARTS = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Quantity:
    """A panel of the chart: it draws the first of `names` that a run has recorded."""

    title: str
    names: tuple[str, ...]
    factor: float = 1


QUANTITIES = (
    Quantity("training loss", ("train_loss", "loss")),
    Quantity("top-1 accuracy (%)", ("ema_top1", "val_top1")),
    Quantity("box AP (%)", ("coco/bbox_mAP",), 100),
    Quantity("mask AP (%)", ("coco/segm_mAP",), 100),
    Quantity("mIoU (%)", ("mIoU",)),
    Quantity("learning rate", ("lr",)),
)


@dataclass
class Run:
    """The curves of a run.

    Attributes:
        name: Name in the legend.
        unit: What steps are: 'epoch' or 'iteration'.
        scalars: {name: {step: value}}, finite values.
        left_out: Number of values that are not finite.
    """

    name: str
    unit: str
    scalars: dict[str, dict[int, float]] = field(default_factory=dict)
    left_out: int = 0

    def add(self, name: str, step: int, value: float) -> None:
        """Add a value of a scalar, or count it if it is not finite."""
        if is_finite(value):
            self.scalars.setdefault(name, {})[step] = value
        else:
            self.left_out += 1

    @property
    def length(self) -> int:
        """The last step."""
        return max(max(values) for values in self.scalars.values())


def read_run(folder: Path) -> Run:
    """Read the curves of a run from its output or work folder.

    Args:
        folder: Folder with `metrics.csv` of a classifier, or with `*/vis_data/scalars.json` of a
            detector or segmentor.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it contains no curves.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"RUN must be the folder of a run, got {folder}")
    if (folder / "metrics.csv").is_file():
        run = Run(folder.name, "epoch")
        _read_csv(folder / "metrics.csv", run)
    else:
        run = Run(folder.name, "iteration")
        _read_scalars(folder, run)
    if not run.scalars:
        raise ValueError(
            "RUN must contain metrics.csv or */vis_data/scalars.json of a run with finite values, "
            f"got {folder}"
        )
    if run.left_out:
        _logger.warning("%s: left out %d values that are not finite", folder, run.left_out)
    return run


def _read_csv(path: Path, run: Run) -> None:
    with open(path, newline="", errors="replace") as file:
        for row in csv.DictReader(file):
            if not (row.get("epoch") or "").isdecimal():  # a damaged row
                continue
            for name, text in row.items():
                try:
                    value = float(text)
                except (TypeError, ValueError):  # a cell without a number
                    continue
                if name and name != "epoch":
                    run.add(name, int(row["epoch"]), value)


def _read_scalars(folder: Path, run: Run) -> None:
    """Read the values by iteration; the latest attempt of a run wins."""
    rows = read_rows(folder)
    ends: dict[int, int] = {}  # last logged iteration of each epoch
    for row in rows:
        if isinstance(row.get("epoch"), int) and "iter" in row:
            ends[row["epoch"]] = max(row["step"], ends.get(row["epoch"], 0))
    validations = {row["step"] for row in rows if "iter" not in row}
    # mmengine counts validations in epochs, unless log_metric_by_epoch=False.
    in_epochs = bool(ends) and validations <= ends.keys() and max(ends.values()) > max(ends)
    for row in rows:
        step = row["step"] if "iter" in row or not in_epochs else ends[row["step"]]
        for name, value in row.items():
            if name in ("step", "iter", "epoch") or not is_number(value):
                continue
            if name in ("time", "data_time") and "iter" not in row:
                name = f"val/{name}"
            run.add(name, step, value)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read several runs, named by as much of their paths as makes the names unique.

    Raises:
        FileNotFoundError: See :func:`read_run`.
        ValueError: If a folder contains no curves or is given twice.
    """
    runs = [read_run(folder) for folder in folders]
    paths = [folder.resolve() for folder in folders]
    if len({*paths}) < len(paths):
        twice = next(path for i, path in enumerate(paths) if path in paths[:i])
        raise ValueError(f"RUN must be given once, got {twice} twice")
    for run, path in zip(runs, paths, strict=True):
        parts = 1
        while sum(other.parts[-parts:] == path.parts[-parts:] for other in paths) > 1:
            parts += 1
        run.name = os.path.join(*path.parts[-parts:])
    return runs


def compare_runs(runs: Sequence[Run], output: Path, metrics: Sequence[str] = ()) -> None:
    """Write the curves of runs to a chart, or to a table.

    Args:
        runs: Runs to compare.
        output: Path of the chart (.png, .svg or .pdf) or the table (.csv).
        metrics: Names of scalars; by default the loss, the learning rate and the main metrics.

    Raises:
        ValueError: If the suffix of `output` is another, or no run has recorded a scalar or,
            without `metrics`, any of the main ones.
        OSError: If the file cannot be written.
    """
    known = list(dict.fromkeys(name for run in runs for name in run.scalars))
    for name in metrics:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"
            raise ValueError(f"--metrics must be recorded by a run, got '{name}'{hint}")
    if output.suffix.lower() == ".csv":
        write_table(output, ("run", "metric", "step", "unit", "value"), (
            (run.name, name, step, run.unit, value)
            for run in runs
            for name, values in run.scalars.items() if not metrics or name in metrics
            for step, value in sorted(values.items())
        ))  # fmt: skip
        return
    if output.suffix.lower() not in CHARTS:
        raise ValueError(f"-o must end in {', '.join(CHARTS)} or .csv, got {output}")
    chosen = [Quantity(name, (name,)) for name in metrics] or QUANTITIES
    panels = {
        quantity: lines
        for quantity in chosen
        if (lines := {run.name: line for run in runs if (line := _line(run, quantity))})
    }
    if not panels:
        raise ValueError(f"--metrics must name what to draw, got none; known: {', '.join(known)}")
    save_figure(output, _draw(runs, panels))


def _line(run: Run, quantity: Quantity) -> dict[int, float] | None:
    name = next((name for name in quantity.names if name in run.scalars), None)
    return None if name is None else run.scalars[name]


def _draw(runs: Sequence[Run], panels: Mapping[Quantity, Mapping[str, dict[int, float]]]) -> Figure:
    units = {run.unit for run in runs}
    columns = min(3, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(4.6 * columns, 3.3 * rows + 0.3 * len(runs)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    colors = dict(zip((run.name for run in runs), palette(len(runs)), strict=True))
    for (quantity, lines), axis in zip(panels.items(), axes, strict=False):
        for run in runs:
            if run.name not in lines:
                continue
            steps, values = zip(*sorted(lines[run.name].items()), strict=True)
            x = np.array(steps, dtype=float)
            if len(units) > 1:
                x *= 100 / max(run.length, 1)  # a run may have recorded step 0 alone
            axis.plot(
                x, np.array(values) * quantity.factor, color=colors[run.name], linewidth=1.5,
                marker="o" if len(values) < 30 else None, markersize=3,
            )  # fmt: skip
        xlabel = "progress (%)" if len(units) > 1 else next(iter(units))
        axis.set(title=label(quantity.title), xlabel=xlabel)
        axis.grid(alpha=0.3)
    for axis in list(axes):  # panels that are not used
        axis.remove()
    handles = [
        figure.axes[0].plot([], [], color=colors[run.name], label=run.name.replace("$", r"\$"))[0]
        for run in runs
    ]
    figure.legend(handles=handles, loc="outside lower center")
    return figure
