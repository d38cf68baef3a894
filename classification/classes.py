"""The names of classes: which label of a data set is which output of a model."""

import logging
from collections.abc import Mapping, Sequence

from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.utils import natural_key
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


def names_of(checkpoint: Mapping) -> list[str] | None:
    """Return the class names of a checkpoint of classification.train, None if it has none."""
    classes, config = checkpoint.get("classes"), checkpoint.get("config")
    is_named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not is_named or not isinstance(config, dict):
        return None
    kind = (config.get("data") or {}).get("kind")
    unnamed = kind and classes == [str(i) for i in range(len(classes))]
    return None if unnamed else classes


def set_labels(dataset: Dataset, names: list[str] | None, source: str, num_classes: int) -> None:
    """Label a data set by the names of a model's classes.

    For weights without names, the data's own may be the synsets of ImageNet or the indices of the
    classes; else its classes count in their order.

    Raises:
        ConfigError: The names are not as many as the model's classes, the data has a class that the
            model does not know, or, without names, another number of classes than the model.
    """
    if names is not None and len(names) != num_classes:
        raise ConfigError(f"{source} must name its {num_classes} classes, it names {len(names)}")
    own = class_to_index(dataset)
    if names is None:
        subset = infer_imagenet_subset({"num_classes": num_classes})
        synsets = ImageNetInfo(subset).label_names() if subset else []
        indices = [str(i) for i in range(num_classes)]
        names = next((known for known in (synsets, indices) if own.keys() <= set(known)), None)
    if names is not None:
        match_classes(dataset, names, source)
    elif own and len(own) != num_classes:
        raise ConfigError(
            f"the data must have the {num_classes} classes of {source}, which does not name them, "
            f"got {len(own)}"
        )
    elif own:
        _warn_of_order(sorted(own, key=own.get), source)


def _warn_of_order(names: list[str], source: str) -> None:
    """Warn if the natural and the lexicographic order of class names differ."""
    natural, lexicographic = sorted(names, key=natural_key), sorted(names)
    if natural == lexicographic:
        return
    taken, other = ("natural", "lexicographic"), lexicographic
    if names == lexicographic:
        taken, other = taken[::-1], natural
    i = next(i for i, (a, b) in enumerate(zip(names, other, strict=True)) if a != b)
    _logger.log(
        on_first(logging.WARNING),
        "%s does not name its classes: the folders count in %s order, class %d is %s; in %s order "
        "it would be %s (torchvision's ImageFolder is lexicographic, timm natural)",
        source, taken[0], i, printable(names[i]), taken[1], printable(other[i]),
    )  # fmt: skip


def _some(names: Sequence[str]) -> str:
    return printable(", ".join(names[:5])) + (", ..." if len(names) > 5 else "")
