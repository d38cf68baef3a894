"""The names of classes: which label of a data set is which output of a model."""

import logging
from collections.abc import Sequence

from torch.utils.data import Dataset

from .config import ConfigError
from .folders import printable
from .processes import on_first

_logger = logging.getLogger(__name__)


def class_to_index(dataset: Dataset) -> dict[str, int]:
    """Return the indices of a data set's classes by their names; empty if it has no names."""
    source = getattr(dataset, "reader", dataset)
    for name in ("class_to_idx", "class_name_to_idx"):  # the latter is that of tar files
        if getattr(source, name, None):
            return getattr(source, name)
    return {}


def class_names(dataset: Dataset, num_classes: int) -> list[str]:
    """Return the names of a model's classes: those of its training data, then their numbers.

    Raises:
        ConfigError: The data set has more classes than the model, or a single one.
    """
    class_to_idx = class_to_index(dataset)
    if len(class_to_idx) > num_classes:
        raise ConfigError(
            f"model.num_classes={num_classes} is too small for the data set's "
            f"{len(class_to_idx)} classes"
        )
    if len(class_to_idx) == 1:
        raise ConfigError(
            f"the training split must have at least 2 classes, got 1: {next(iter(class_to_idx))}"
        )
    if class_to_idx and len(class_to_idx) < num_classes:
        _logger.log(
            on_first(logging.WARNING),
            "the data set has %d classes, which count as the first of the model's %d",
            len(class_to_idx), num_classes,
        )  # fmt: skip
    names = {index: name for name, index in class_to_idx.items()}
    return [names.get(i, str(i)) for i in range(num_classes)]


def match_classes(dataset: Dataset, names: Sequence[str], source: str) -> None:
    """Map the labels of a data set to a model's classes by name; classes may be missing.

    Args:
        dataset: A data set of timm or torchvision; one without names keeps its labels.
        names: Names of the classes, in the order of the model's outputs.
        source: Where the names come from, for messages.

    Raises:
        ConfigError: A class of the data set is unknown, or a name is used twice.
    """
    class_to_idx = class_to_index(dataset)
    if not class_to_idx or list(names) == sorted(class_to_idx, key=class_to_idx.get):
        return
    indices = {name: i for i, name in enumerate(names)}
    if unknown := [name for name in class_to_idx if name not in indices]:
        raise ConfigError(
            f"the data has {len(unknown)} classes that are unknown to {source}: {_some(unknown)}; "
            f"it knows {_some(list(names))}"
        )
    if len(indices) < len(names):
        raise ConfigError(f"{source} has two classes of the same name")
    if missing := [name for name in names if name not in class_to_idx]:
        _logger.log(
            on_first(logging.WARNING),
            "the data has images of %d of the %d classes of %s, none of: %s",
            len(class_to_idx), len(names), source, _some(missing),
        )  # fmt: skip
    table = {class_to_idx[name]: indices[name] for name in class_to_idx}
    dataset.target_transform = table.__getitem__


def _some(names: Sequence[str]) -> str:
    return printable(", ".join(names[:5])) + (", ..." if len(names) > 5 else "")
