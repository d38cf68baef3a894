"""The result of checking a dataset: counts for each split, and all faults."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import write_csv, write_text

_SHOWN = 10  # faults of a kind in the text; the files list all
_SHOWN_CLASSES = 40


class Notes(logging.Handler):
    """Collects the messages of logged warnings.

    Args:
        notes: List to which they are appended.
    """

    def __init__(self, notes: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.notes = notes

    def emit(self, record: logging.LogRecord) -> None:
        """Append the message of a record."""
        self.notes.append(record.getMessage())


@dataclass(frozen=True)
class Fault:
    """Something that training refuses or leaves out, or that makes its results misleading.

    Attributes:
        split: Name of the split, such as `train`.
        kind: What is wrong, in a few words that faults have in common.
        message: One line that names the file or setting.
    """

    split: str
    kind: str
    message: str


@dataclass
class Split:
    """Contents of a split.

    Attributes:
        name: `train`, `val` or `test`.
        source: Annotation file or folder.
        unit: What is counted for each class: `objects`, `images` or `pixels`.
        images: Number of images.
        sizes: Number of images for each (height, width).
        classes: Names of the classes, in their order.
        counts: Objects, images or pixels of each class.
        images_with: Number of images that contain each class.
        empty: Names of the images without annotated objects or labeled pixels.
        extra: Further numbers by name, such as `crowds`.
        notes: Warnings that training would log.
        paths: Paths of the images that exist.
    """

    name: str
    source: str
    unit: str
    images: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    classes: tuple[str, ...] = ()
    counts: Counter[str] = field(default_factory=Counter)
    images_with: Counter[str] = field(default_factory=Counter)
    empty: list[str] = field(default_factory=list)
    extra: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    def size_range(self) -> str:
        """Return the smallest and largest image size by area, and that of most images."""
        if not self.sizes:
            return "-"
        by_area = sorted(self.sizes, key=lambda size: (size[0] * size[1], size))
        if len(by_area) == 1:
            return _size(by_area[0])
        common, count = self.sizes.most_common(1)[0]
        mostly = f", mostly {_size(common)}" if 2 * count > self.sizes.total() else ""
        return f"{_size(by_area[0])} to {_size(by_area[-1])}{mostly}"


def _size(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]}"


@dataclass
class Report:
    """Splits of a dataset and the faults in them."""

    config: str
    task: str
    splits: list[Split] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def add(self, split: str, kind: str, messages: Iterable[object]) -> None:
        """Add one fault for each message."""
        self.faults += [Fault(split, kind, " ".join(str(m).split())) for m in messages]

    def class_rows(self) -> list[list[Any]]:
        """Return a header and, for each class, its counts and images in each split."""
        names: list[str] = []
        for split in self.splits:
            names += [name for name in split.classes if name not in names]
        header: list[Any] = ["class"]
        for split in self.splits:
            header.append(f"{split.name} {split.unit}")
            if split.unit != "images":
                header.append(f"{split.name} images")
        rows = [header]
        for name in names:
            row: list[Any] = [name]
            for split in self.splits:
                row.append(split.counts[name])
                if split.unit != "images":
                    row.append(split.images_with[name])
            rows.append(row)
        return rows

    def text(self) -> str:
        """Return the report for a terminal."""
        rows = [["split", "images", "without annotation", "width x height", "source"]]
        for split in self.splits:
            extra = "".join(f", {n} {what}" for what, n in split.extra.items() if n)
            rows.append(
                [
                    split.name,
                    str(split.images) + extra,
                    str(len(split.empty)),
                    split.size_range(),
                    split.source,
                ]
            )
        parts = [_table(rows)]
        header, *classes = self.class_rows()
        if classes:
            shown = classes[:_SHOWN_CLASSES]
            parts.append(_table([header, *shown], numbers=True))
            if len(classes) > len(shown):
                parts.append(f"and {len(classes) - len(shown)} further classes (see -o)\n")
        if notes := [(split.name, note) for split in self.splits for note in split.notes]:
            parts.append("training will warn:\n" + "".join(f"  {s}: {n}\n" for s, n in notes))
        parts.append(self._fault_text())
        return "\n".join(parts)

    def _fault_text(self) -> str:
        if not self.faults:
            return "no faults\n"
        kinds: dict[str, list[Fault]] = {}
        for fault in self.faults:
            kinds.setdefault(fault.kind, []).append(fault)
        lines = [f"{len(self.faults)} fault{'s' * (len(self.faults) > 1)}"]
        for kind, faults in kinds.items():
            lines.append(f"{kind} ({len(faults)}):")
            lines += [f"  {fault.split}: {fault.message}" for fault in faults[:_SHOWN]]
            if len(faults) > _SHOWN:
                lines.append(f"  and {len(faults) - _SHOWN} more (see -o)")
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> None:
        """Write report.json, classes.csv and faults.csv to a folder."""
        splits = []
        for split in self.splits:
            content = {key: value for key, value in vars(split).items() if key != "paths"}
            content["sizes"] = [
                {"height": height, "width": width, "images": count}
                for (height, width), count in sorted(split.sizes.items())
            ]
            splits.append(content)
        report = {
            "config": self.config,
            "task": self.task,
            "splits": splits,
            "faults": [asdict(fault) for fault in self.faults],
        }
        text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        write_text(folder / "report.json", text)
        write_csv(folder / "classes.csv", self.class_rows())
        rows = [["split", "kind", "message"], *(list(asdict(f).values()) for f in self.faults)]
        write_csv(folder / "faults.csv", rows)


def _table(rows: Sequence[Sequence[Any]], numbers: bool = False) -> str:
    """Align the columns of a table; all but the first are numbers if `numbers`."""
    cells = [[" ".join(str(cell).split()) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = [
            cell.rjust(width) if numbers and i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip() + "\n")
    return "".join(lines)
