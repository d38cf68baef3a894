"""Charts that stay readable for any number of classes."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay

from ..drawing import class_colors

# Classes in a chart; with more, it shows the worst.
BARS = 30
MATRIX = 20
LINES = 10

# Width of truth and prediction side by side in a contact sheet, in pixels.
CELL = 600


def label(name: str) -> str:
    """Return a class name as matplotlib draws it verbatim: short, printable, without mathtext."""
    text = "".join(c if c.isprintable() else "?" for c in name)
    text = text if len(text) <= 24 else f"{text[:23]}…"
    return text.replace("$", r"\$")


def palette(count: int) -> np.ndarray:
    """Return (count, 3) distinct colors from 0 to 1 for lines, darkened to be seen on white."""
    colors = class_colors(count) / 255
    lightness = colors @ [0.2126, 0.7152, 0.0722]
    return colors * np.minimum(1, 0.65 / np.maximum(lightness, 0.01))[:, None]


def lowest(values: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the lowest values in ascending order, leaving out NaN."""
    order = np.argsort(values, kind="stable")  # NaN comes last
    return order[~np.isnan(values[order])][:count]


def bar_chart(
    names: Sequence[str], values: np.ndarray, quantity: str, mean: float | None = None
) -> Figure:
    """Return the lowest values of all classes as bars.

    Args:
        names: Class names.
        values: (classes,) percentages; NaN for classes without one.
        quantity: Name and unit of the values, such as "IoU (%)".
        mean: Value of a vertical line.
    """
    shown = lowest(values, BARS)
    figure = Figure(figsize=(7, 1.2 + 0.24 * max(4, len(shown))), layout="constrained")
    axis = figure.subplots()
    bars = axis.barh(range(len(shown)), values[shown])
    axis.set_yticks(range(len(shown)), [label(names[i]) for i in shown])
    axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    if mean is not None and not np.isnan(mean):
        axis.axvline(mean, color="black", linestyle="--", linewidth=1, zorder=0)
        quantity += f", mean {mean:.1f} (dashed)"
    axis.invert_yaxis()
    axis.set(title=_title(len(shown), len(names), "lowest"), xlabel=quantity, xlim=(0, 110))
    axis.grid(axis="x", alpha=0.3)
    return figure


def _title(shown: int, count: int, which: str) -> str:
    return f"all {count} classes" if shown == count else f"the {shown} {which} of {count} classes"


def top_confusions(matrix: np.ndarray) -> list[tuple[int, int]]:
    """Return the pairs (true class, predicted class) that are confused, most frequent first."""
    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    pairs = np.argwhere(wrong)
    order = np.argsort(-wrong[tuple(pairs.T)], kind="stable")
    return [(true, predicted) for true, predicted in pairs[order].tolist()]


def confusion_chart(matrix: np.ndarray, names: Sequence[str]) -> Figure:
    """Return a confusion matrix in percent of each true class.

    Args:
        matrix: (classes, classes) counts, the true classes in rows. Of many classes, those with
            the most frequent confusions are shown.
        names: Class names.
    """
    shown: np.ndarray = np.arange(len(names))
    if len(names) > MATRIX:
        chosen: dict[int, None] = {}
        for pair in top_confusions(matrix):
            if len({*chosen, *pair}) <= MATRIX:
                chosen |= dict.fromkeys(pair)
        shown = np.array(sorted(chosen), dtype=int)
    totals = np.maximum(matrix.sum(1, keepdims=True), 1)
    percent = (100 * matrix / totals)[np.ix_(shown, shown)]
    size = 2.5 + 0.42 * max(4, len(shown))
    figure = Figure(figsize=(size, size), layout="constrained")
    axis = figure.subplots()
    if not len(shown):  # many classes and no confusions
        axis.set(title=f"no confusions among {len(names)} classes")
        return figure
    display = ConfusionMatrixDisplay(
        percent, display_labels=[label(names[i]) for i in shown.tolist()]
    )
    display.plot(ax=axis, values_format=".0f", cmap="Blues", colorbar=False, xticks_rotation=90)
    for text in display.text_.flat if display.text_ is not None else ():
        text.set_fontsize(8)
        if text.get_text() == "0":
            text.set_text("")
    which = f"{len(shown)} most confused of {len(names)}" if len(shown) < len(names) else "all"
    axis.set(
        title=f"{which} classes, % of the true class", xlabel="predicted class", ylabel="true class"
    )
    return figure


def precision_recall_chart(
    recalls: np.ndarray, lines: Mapping[str, np.ndarray], title: str, ordered: bool = False
) -> Figure:
    """Return precision-recall curves with a legend beside them.

    Args:
        recalls: (n,) recalls.
        lines: Precisions (n,) by name.
        title: Title of the chart.
        ordered: Whether the order of the lines has a meaning, which the colors then show.
    """
    count = len(lines)
    colors = colormaps["viridis"](np.linspace(0, 0.95, count)) if ordered else palette(count)
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axis = figure.subplots()
    for color, (name, values) in zip(colors, lines.items(), strict=True):
        axis.plot(recalls, values, label=label(name), color=color)
    axis.set(title=title, xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    return figure
