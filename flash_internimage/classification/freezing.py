"""Exclude parts of a model from training."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from ..checkpoints.weights import classifier_names
from .errors import ConfigError

BACKBONE = "backbone"


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    """Disable the gradients of parts of a model.

    Unlike :func:`timm.utils.freeze`, it replaces no batch norm layers, so that checkpoints keep
    their names. Their statistics only remain unchanged while the returned modules are in evaluation
    mode.

    Args:
        model: timm model, changed in place.
        patterns: Names or wildcards of modules and parameters, or 'backbone' for everything but the
            classifier.

    Returns:
        The frozen modules, to be kept in evaluation mode.

    Raises:
        ConfigError: If a pattern matches nothing, or all parameters are frozen.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    parameters = dict(model.named_parameters())
    chosen: set[str] = set()
    for pattern in patterns:
        names = [*modules, *parameters]
        if pattern == BACKBONE:
            matching = [name for name in names if not _is_near(name, _classifiers(model))]
        else:
            matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            children = ", ".join(name for name, _ in model.named_children())
            raise ConfigError(
                f"model.freeze must name parts of the model, got '{pattern}'; its outermost parts "
                f"are {children}"
            )
        chosen.update(matching)
    for name, parameter in parameters.items():
        if not chosen.isdisjoint(_prefixes(name)):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError(
            f"model.freeze must leave some parameters to train, got {', '.join(patterns)}"
        )
    return [module for name, module in modules.items() if not chosen.isdisjoint(_prefixes(name))]


def _classifiers(model: nn.Module) -> list[str]:
    """Return the names of the classifiers of a timm model."""
    names = [*classifier_names(model)]
    if not names:
        raise ConfigError(
            f"model.freeze must name modules, as {type(model).__name__} has no classifier, got "
            f"'{BACKBONE}'"
        )
    return names


def _is_near(name: str, classifiers: Sequence[str]) -> bool:
    """Return whether a name is that of a classifier, within it, or contains it."""
    return any(f"{name}.".startswith(f"{c}.") or c.startswith(f"{name}.") for c in classifiers)


def _prefixes(name: str) -> Iterator[str]:
    """Yield the name and those of the modules that contain it."""
    while name:
        yield name
        name = name.rpartition(".")[0]
