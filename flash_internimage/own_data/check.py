"""Check the dataset of a config, with the checks that training runs at its start."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .duplicates import MAX_PAIRS, find_duplicates, find_similar
from .report import Report

_PICTURES = 12  # in the contact sheet, per split
_SHOWN = 10  # of identical images
_COLUMNS, _CELL_WIDTH = 3, 400


@dataclass(frozen=True)
class Options:
    """What to check.

    Attributes:
        decode: Whether to decode all images; otherwise, only their headers are read.
        similar: Maximum number of bits in which the 64-bit hashes of images in different splits
            may differ to be reported as near-duplicates; None to find identical files only.
        pictures: Whether to draw a contact sheet.
        overrides: Values of settings that differ from the config, by dotted key.
    """

    decode: bool = True
    similar: int | None = None
    pictures: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Findings:
    """A report, and what it needs besides the counts.

    Attributes:
        report: Counts and faults.
        hashes: Hash of each image by path, for each split; see `Options.similar`.
        pictures: Pictures of annotated images, small (H, W, 3) uint8, and their captions.
    """

    report: Report
    hashes: dict[str, dict[str, int]] = field(default_factory=dict)
    pictures: list[tuple[np.ndarray, str]] = field(default_factory=list)

    def add_picture(self, picture: np.ndarray, caption: str) -> None:
        """Keep a picture, (H, W, 3) uint8, reduced to its size in the contact sheet."""
        image = Image.fromarray(picture)
        image.thumbnail((_CELL_WIDTH, _CELL_WIDTH), Image.Resampling.LANCZOS)
        self.pictures.append((np.asarray(image), caption))


def check_dataset(config: Path, options: Options) -> Findings:
    """Check the data of a config for training or evaluation.

    Args:
        config: Config of a classifier (*.yaml), detector or segmentor (*.py).
        options: What to check.

    Returns:
        Counts, faults and pictures. Faults of the data do not raise errors.

    Raises:
        ValueError: If the config cannot be read, or its datasets are of a kind that cannot be
            checked.
        FileNotFoundError: If the config does not exist.
    """
    if config.suffix in (".yaml", ".yml"):
        from .check_classification import check_classification as check
    else:
        from .check_openmmlab import check_openmmlab as check
    findings = check(config, options)
    _add_duplicates(findings, options)
    return findings


def _add_duplicates(findings: Findings, options: Options) -> None:
    report = findings.report
    groups = find_duplicates({split.name: split.paths for split in report.splits})
    for group in groups:
        splits = list(dict.fromkeys(split for split, _ in group))
        if len(splits) > 1:
            # An image of each split first.
            firsts = [next(place for place in group if place[0] == split) for split in splits]
            shown = [*firsts, *(place for place in group if place not in firsts)][:_SHOWN]
            names = " = ".join(f"{path} ({split})" for split, path in shown)
            names += f" and {len(group) - _SHOWN} more" * (len(group) > _SHOWN)
            report.add(" and ".join(splits), "identical images in several splits", [names])
        else:
            split = next(split for split in report.splits if split.name == splits[0])
            split.extra["repeated"] = split.extra.get("repeated", 0) + len(group) - 1
    if options.similar is None:
        return
    # Of identical images, the first is compared with those of other splits.
    repeated = {place for group in groups for place in group[1:]}
    hashes = {
        split: {path: value for path, value in some.items() if (split, path) not in repeated}
        for split, some in findings.hashes.items()
    }
    pairs, total = find_similar(hashes, options.similar, MAX_PAIRS)
    kind = "similar images in several splits"
    for (first, one), (second, other), bits in pairs:
        message = f"{one} ({first}) and {other} ({second}) differ in {bits} of 64 bits"
        report.add(f"{first} and {second}", kind, [message])
    if total > len(pairs):
        report.add("all splits", kind, [f"{total - len(pairs)} further pairs"])


def draw_sheet(findings: Findings) -> np.ndarray:
    """Return a contact sheet of the annotated images, (H, W, 3) uint8.

    Raises:
        ValueError: If there are no pictures.
    """
    from ..drawing import contact_sheet

    pictures = [picture for picture, _ in findings.pictures]
    return contact_sheet(
        pictures, [caption for _, caption in findings.pictures], _COLUMNS, _CELL_WIDTH
    )


def choose(count: int) -> list[int]:
    """Return the indices of the images to draw, spread over `count` images."""
    number = min(count, _PICTURES)
    return [i * count // number for i in range(number)]
