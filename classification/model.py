"""The model of a configuration, with its initial weights."""

import difflib
from pathlib import Path

import timm
import torch
from torch import nn

import flash_internimage  # noqa: F401  (registers the models)
from flash_internimage.checkpoint import (
    clean_state_dict,
    fetch_checkpoint,
    load_checkpoint,
    load_weights,
)

from .config import ConfigError, Model


def build_model(options: Model) -> nn.Module:
    """A timm model on the CPU.

    Raises:
        ConfigError: the name or an argument is unknown, or the initial checkpoint does not fit.
    """
    if not timm.is_model(options.name):
        close = difflib.get_close_matches(options.name, timm.list_models(), n=1)
        hint = f", did you mean '{close[0]}'?" if close else ""
        raise ConfigError(f"model.name: timm knows no model '{options.name}'{hint}")
    try:
        model = timm.create_model(
            options.name,
            num_classes=options.num_classes,
            drop_path_rate=options.drop_path_rate,
            **options.args,
        )
    except TypeError as error:
        raise ConfigError(
            f"model.args {options.args} do not fit {options.name}: {error}"
        ) from error
    if options.initial_checkpoint is not None:
        _load_initial(model, options)
    if options.grad_checkpointing:
        model.set_grad_checkpointing()
    return model


def _load_initial(model: nn.Module, options: Model) -> None:
    class_map = None
    if options.class_map is not None:
        try:
            class_map = [int(line) for line in Path(options.class_map).read_text().split()]
        except (OSError, ValueError) as error:
            raise ConfigError(f"model.class_map {options.class_map}: {error}") from error
    try:
        checkpoint = load_checkpoint(fetch_checkpoint(options.initial_checkpoint))
        load_weights(model, clean_state_dict(checkpoint), class_map)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.initial_checkpoint: {error}") from error
    classes = checkpoint.get("classes")  # a checkpoint of classification.train names them
    if isinstance(classes, list):
        names = classes if class_map is None else [classes[i] for i in class_map]
        if len(names) == options.num_classes:  # else the classifier starts anew
            model.pretrained_cfg["label_names"] = names


def pick_device(name: str) -> torch.device:
    """The device of a name; 'auto' takes an accelerator if there is one."""
    if name != "auto":
        return torch.device(name)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
