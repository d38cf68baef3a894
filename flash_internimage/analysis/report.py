"""The folder of a report: tables as CSV, charts as PNG, and a summary in Markdown."""

import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from ..files import write_atomically, write_csv, write_text

# Rows of a table in the summary; the CSV files have all.
ROWS = 10


class Report:
    """A report in a folder; call :meth:`write` at the end.

    Args:
        folder: Folder of the report, which exists.
        title: First line of the summary.
    """

    def __init__(self, folder: Path, title: str) -> None:
        self.folder = folder
        self.lines = [f"# {title}", ""]
        self.figures: dict[str, Any] = {}

    def add_figures(self, figures: Mapping[str, Any]) -> None:
        """Add the figures of the evaluation, which `summary.json` contains, too."""
        figures = {
            name: round(float(value), 4) if isinstance(value, np.floating) else value
            for name, value in figures.items()
        }
        self.figures |= figures
        self._table(("figure", "value"), [(name, _text(value)) for name, value in figures.items()])

    def add_text(self, text: str) -> None:
        """Add a paragraph."""
        self.lines += [text, ""]

    def add_table(
        self,
        title: str,
        name: str,
        header: Sequence[str],
        rows: Sequence[Sequence[Any]],
        shown: int = ROWS,
    ) -> None:
        """Write a table to a CSV file and add its first rows to the summary.

        Args:
            title: Title of the section.
            name: Name of the CSV file.
            header: Names of the columns.
            rows: Rows of the table; NaN and None are empty cells.
            shown: Number of rows in the summary.
        """
        write_table(self.folder / name, header, rows)
        self.lines += [f"## {title}", ""]
        if not rows:
            self.add_text("There are none.")
            return
        self._table(header, [[_text(cell) for cell in row] for row in rows[:shown]])
        more = f"The first {shown} of {len(rows)} rows; all" if len(rows) > shown else "These rows"
        self.add_text(f"{more} are in [{name}]({name}).")

    def add_matrix(self, matrix: np.ndarray, names: Sequence[str]) -> None:
        """Write the counts of a confusion matrix, the true classes in rows, to a CSV file."""
        rows = ([name, *row.tolist()] for name, row in zip(names, matrix, strict=True))
        write_table(self.folder / "confusion_matrix.csv", ["true class", *names], rows)
        self.add_text("All counts are in [confusion_matrix.csv](confusion_matrix.csv).")

    def add_chart(self, title: str, name: str, figure: Figure) -> None:
        """Write a chart to a PNG file and add it to the summary."""
        save_figure(self.folder / name, figure)
        self._add_picture(title, name)

    def add_picture(self, title: str, name: str, picture: np.ndarray) -> None:
        """Write a picture to a PNG file and add it to the summary.

        Args:
            title: Title of the section.
            name: Name of the PNG file.
            picture: (H, W, 3) uint8 array in RGB.
        """
        image = Image.fromarray(picture)
        write_atomically(self.folder / name, lambda file: image.save(file, format="PNG"))
        self._add_picture(title, name)

    def write(self) -> None:
        """Write `report.md` and `summary.json`."""
        text = "\n".join(self.lines).rstrip() + "\n"
        summary = json.dumps(_finite(self.figures), indent=2) + "\n"
        write_text(self.folder / "summary.json", summary)
        write_text(self.folder / "report.md", text)

    def _add_picture(self, title: str, name: str) -> None:
        self.lines += [f"## {title}", "", f"![{title}]({name})", ""]

    def _table(self, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        self.lines += [_row(header), _row(["---"] * len(header)), *map(_row, rows), ""]


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table to a CSV file; NaN and None are empty cells."""
    write_csv(path, itertools.chain([header], ([_cell(cell) for cell in row] for row in rows)))


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure in the format that the suffix of the path names."""
    kind = path.suffix[1:].lower()
    write_atomically(path, lambda file: figure.savefig(file, dpi=120, format=kind))


def plain(value: Any) -> Any:
    """Return a NumPy scalar as a number of Python, and anything else unchanged."""
    return value.item() if isinstance(value, np.generic) else value


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _cell(value: Any) -> Any:
    value = plain(value)
    return "" if value is None or _is_nan(value) else value


def _text(value: Any) -> str:
    value = plain(value)
    if value is None or _is_nan(value):
        return ""
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1e4 else str(value)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(escape(cell) for cell in cells)} |"


def escape(text: str) -> str:
    """Return a text whose characters mean nothing in a table of Markdown."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    for special in "\\|`*_<[":
        text = text.replace(special, f"\\{special}")
    return text


def _finite(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return figures as JSON has them: null for NaN and infinity."""
    values = {name: plain(value) for name, value in figures.items()}
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def relative(path: str | os.PathLike, start: str | os.PathLike) -> str:
    """Return a path relative to a folder that contains it, otherwise unchanged."""
    inside = os.path.relpath(path, start)
    return os.fspath(path) if inside.startswith(os.pardir) else inside
