"""Match the labels of a dataset to the outputs of a model by class name."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.utils import natural_key

from ..config import ConfigError
from ..processes import on_first
from .datasets import ImageSet
from .folders import printable

_logger = logging.getLogger(__name__)


def class_to_index(dataset: object) -> dict[str, int]:
    """Return the class indices of a dataset by class name; empty if it has no names."""
    source = getattr(dataset, "reader", dataset)
    for name in ("class_to_idx", "class_name_to_idx"):  # the second is that of timm's tar reader
        if getattr(source, name, None):
            return getattr(source, name)
    return {}


def class_names(dataset: object, num_classes: int) -> list[str]:
    """Return the class names of a model, in the order of its outputs.

    They are those of its training data; classes beyond these are named by their index.

    Args:
        dataset: Training data of timm or torchvision.
        num_classes: Number of classes of the model.

    Raises:
        ConfigError: If the dataset has more classes than the model, or only one.
    """
    class_to_idx = class_to_index(dataset)
    if len(class_to_idx) > num_classes:
        raise ConfigError(
            f"model.num_classes must be at least {len(class_to_idx)}, the number of classes of the "
            f"dataset, got {num_classes}"
        )
    if len(class_to_idx) == 1:
        raise ConfigError(
            f"the training split must have at least 2 classes, got 1: {next(iter(class_to_idx))}"
        )
    if class_to_idx and len(class_to_idx) < num_classes:
        _logger.log(
            on_first(logging.WARNING),
            "the dataset has %d classes, mapped to the first of the model's %d outputs",
            len(class_to_idx), num_classes,
        )  # fmt: skip
    names = {index: name for name, index in class_to_idx.items()}
    return [names.get(i, str(i)) for i in range(num_classes)]


def balanced_weights(dataset: ImageSet, num_classes: int) -> list[float]:
    """Return class weights that give all classes the same total weight in a dataset.

    As scikit-learn's 'balanced', they average 1 over the images. Classes without images have the
    weight 0.

    Args:
        dataset: Training data.
        num_classes: Number of classes of the model.

    Raises:
        ConfigError: If the labels are not known before the images are read.
    """
    reader = dataset.reader
    labels = getattr(reader, "targets", None)
    if labels is None and hasattr(reader, "samples"):
        labels = [label for _, label in reader.samples]
    if labels is None:
        raise ConfigError(
            "class_weights must be a list of numbers for data that are not in folders or tar files "
            "and whose labels cannot be counted in advance, got 'balanced'"
        )
    counts = torch.bincount(torch.as_tensor(labels), minlength=num_classes)
    return (counts.sum() / (counts.count_nonzero() * counts)).nan_to_num(posinf=0).tolist()


def match_classes(dataset: ImageSet, names: Sequence[str], source: str) -> None:
    """Map the labels of a dataset to the classes of a model by name, in place.

    The dataset may lack classes, which is logged as a warning.

    Args:
        dataset: Dataset of timm or torchvision. Without class names, it keeps its labels.
        names: Class names of the model, in the order of its outputs.
        source: Origin of the names, for error messages.

    Raises:
        ConfigError: If a class of the dataset is unknown, or two classes have the same name.
    """
    class_to_idx = class_to_index(dataset)
    if not class_to_idx or list(names) == sorted(class_to_idx, key=class_to_idx.__getitem__):
        return
    indices = {name: i for i, name in enumerate(names)}
    if unknown := [name for name in class_to_idx if name not in indices]:
        count = "1 class is" if len(unknown) == 1 else f"{len(unknown)} classes are"
        raise ConfigError(f"{count} not in {source} ({_some(list(names))}): {_some(unknown)}")
    if len(indices) < len(names):
        raise ConfigError(f"class names must be unique, {source} has duplicates")
    if missing := [name for name in names if name not in class_to_idx]:
        _logger.log(
            on_first(logging.WARNING),
            "the dataset has %d of the %d classes of %s, missing: %s",
            len(class_to_idx), len(names), source, _some(missing),
        )  # fmt: skip
    table = {class_to_idx[name]: indices[name] for name in class_to_idx}
    dataset.target_transform = table.__getitem__


def names_of(checkpoint: Mapping[str, Any]) -> list[str] | None:
    """Return the class names in a checkpoint of classification.train, or None if there are none."""
    classes, config = checkpoint.get("classes"), checkpoint.get("config")
    if not isinstance(classes, list) or not isinstance(config, dict):
        return None
    if not all(isinstance(name, str) for name in classes):
        return None
    kind = (config.get("data") or {}).get("kind")
    unnamed = kind and classes == [str(i) for i in range(len(classes))]
    return None if unnamed else classes


def describe_other_classes(checkpoint: Sequence[str], data: Sequence[str]) -> str | None:
    """Describe how the classes of a checkpoint and a dataset differ; None if they are equal.

    Args:
        checkpoint: Class names of the checkpoint, in the order of its outputs.
        data: Class names of the dataset, in the order of its labels.
    """
    checkpoint, data = list(checkpoint), list(data)
    if checkpoint == data:
        return None
    sides = {
        "only in the checkpoint": [name for name in checkpoint if name not in set(data)],
        "only in the data": [name for name in data if name not in set(checkpoint)],
    }
    parts = [
        f"{side}: {', '.join(map(str, names[:5]))}{', ...' if len(names) > 5 else ''}"
        for side, names in sides.items()
        if names
    ]
    if not parts:
        parts = [
            f"class {i} is {old} in the checkpoint and {new} in the data"
            for i, (old, new) in enumerate(zip(checkpoint, data, strict=False))
            if old != new
        ][:1]
    return "; ".join(parts) or f"{len(checkpoint)} in the checkpoint and {len(data)} in the data"


def set_labels(
    dataset: ImageSet, names: list[str] | None, source: str, num_classes: int
) -> list[str]:
    """Map the labels of a dataset to the classes of a model, in place.

    For weights without class names, the classes of the dataset may be named by ImageNet synset or
    by class index. Otherwise they are taken in their order.

    Args:
        dataset: Dataset of timm or torchvision.
        names: Class names of the model, in the order of its outputs; None if unknown.
        source: Origin of the names or weights, for error messages.
        num_classes: Number of classes of the model.

    Returns:
        The class names of the model; indices if they are unknown.

    Raises:
        ConfigError: If the number of names differs from the number of classes, or the dataset has
            a class that the model does not know or, without names, another number of classes.
    """
    if names is not None and len(names) != num_classes:
        raise ConfigError(f"{source} must have {num_classes} class names, got {len(names)}")
    own = class_to_index(dataset)
    if names is None:
        subset = infer_imagenet_subset({"num_classes": num_classes})
        synsets = ImageNetInfo(subset).label_names() if subset else []
        indices = [str(i) for i in range(num_classes)]
        names = next((known for known in (synsets, indices) if own.keys() <= set(known)), None)
    if names is not None:
        match_classes(dataset, names, source)
        return names
    if not own:
        return [str(i) for i in range(num_classes)]
    if len(own) != num_classes:
        raise ConfigError(
            f"the dataset must have all {num_classes} classes of {source}, which has no class "
            f"names, got {len(own)}"
        )
    names = sorted(own, key=own.__getitem__)
    _warn_of_order(names, source)
    return names


def _warn_of_order(names: list[str], source: str) -> None:
    """Warn if the natural and the lexicographic order of the class names differ."""
    natural, lexicographic = sorted(names, key=natural_key), sorted(names)
    if natural == lexicographic:
        return
    taken, other = ("natural", "lexicographic"), lexicographic
    if names == lexicographic:
        taken, other = taken[::-1], natural
    i = next(i for i, (a, b) in enumerate(zip(names, other, strict=True)) if a != b)
    _logger.log(
        on_first(logging.WARNING),
        "%s has no class names: folders are taken in %s order, so that class %d is %s; in %s order "
        "it would be %s (torchvision's ImageFolder uses lexicographic order, timm natural order)",
        source, taken[0], i, printable(names[i]), taken[1], printable(other[i]),
    )  # fmt: skip


def _some(names: Sequence[str]) -> str:
    return printable(", ".join(names[:5])) + (", ..." if len(names) > 5 else "")
