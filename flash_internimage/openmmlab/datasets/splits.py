"""Detection of images shared between training and validation."""

import os
from collections.abc import Iterable, Iterator
from typing import Any

from mmengine.dataset import BaseDataset

from ..utils import log_warning, unwrap_dataset


def warn_of_shared_images(train: Any, val: Any) -> None:
    """Warn if validation images are also trained on.

    Args:
        train: Dataset of mmengine, or a wrapper around one or several.
        val: Likewise.
    """
    trained = set(_real_paths(_image_paths(train)))
    validated = set(_real_paths(_image_paths(val)))
    if shared := sorted(trained & validated):
        log_warning(
            f"{len(shared)} of the {len(validated)} images of val_dataloader are also in "
            f"train_dataloader, the first: {shared[0]}; the metrics do not measure generalization "
            "to new images"
        )


def _image_paths(dataset: Any) -> Iterator[str]:
    for part in unwrap_dataset(dataset):
        for i in range(len(part)) if isinstance(part, BaseDataset) else ():
            if path := part.get_data_info(i).get("img_path"):
                yield path


def _real_paths(paths: Iterable[str]) -> Iterator[str]:
    """Resolve symbolic links, listing each folder once instead of querying every file."""
    folders: dict[str, tuple[str, set[str]]] = {}
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in folders:
            links = set()
            if os.path.isdir(folder):
                with os.scandir(folder) as entries:
                    links = {entry.name for entry in entries if entry.is_symlink()}
            folders[folder] = os.path.realpath(folder), links
        real, links = folders[folder]
        yield os.path.realpath(path) if name in links else os.path.join(real, name)
