"""What the writers of datasets receive."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .annotations import AnnotatedImage, Losses
from .images import ImageWriter


@dataclass(frozen=True)
class Output:
    """A dataset to write.

    Attributes:
        folder: Folder to write to.
        splits: Images of each split.
        classes: Names of the classes, in order.
        losses: Receives what is left out or changed.
        write_images: Writes the images of a split to a folder and returns their names.
    """

    folder: Path
    splits: dict[str, list[AnnotatedImage]]
    classes: Sequence[str]
    losses: Losses
    write_images: ImageWriter
