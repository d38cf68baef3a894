"""Build the model of a configuration with its initial weights."""

import difflib
import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from ..checkpoints import (
    clean_state_dict,
    fetch_checkpoint,
    load_checkpoint,
    load_weights,
)
from ..checkpoints.weights import classifier_names
from .config import ConfigError, Model
from .data.classes import describe_other_classes, names_of
from .data.folders import printable
from .errors import one_line
from .processes import on_first

_logger = logging.getLogger(__name__)


def build_model(options: Model, classes: Sequence[str] | None = None) -> nn.Module:
    """Build a timm model on the CPU.

    Args:
        options: Settings of the model.
        classes: Class names of the data, if known, to match with those of an initial checkpoint.

    Raises:
        ConfigError: If the name or an argument is unknown, or the initial checkpoint does not
            match.
    """
    if options.class_map is not None and options.initial_checkpoint is None:
        raise ConfigError(
            "model.class_map must be null without model.initial_checkpoint, got "
            f"'{options.class_map}'"
        )
    model = create_model(options)
    if options.initial_checkpoint is not None:
        _load_initial(model, options.initial_checkpoint, options.class_map, classes)
    if options.grad_checkpointing:
        try:
            model.set_grad_checkpointing()  # type: ignore[operator]
        except Exception as error:
            raise ConfigError(
                f"model.grad_checkpointing must be false for {options.name}: {one_line(error)}"
            ) from error
    return model


def create_model(options: Model, pretrained: bool = False) -> nn.Module:
    """Create a timm model with random or released weights.

    Args:
        options: Settings of the model.
        pretrained: Load the released weights.

    Raises:
        ConfigError: If the name or an argument is unknown, or the released weights do not load.
    """
    if not timm.is_model(options.name):
        close = difflib.get_close_matches(options.name, timm.list_models(), n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise ConfigError(f"model.name must be a timm model, got '{options.name}'{hint}")
    arguments: dict[str, Any] = {"pretrained": pretrained, "num_classes": options.num_classes}
    rate = options.drop_path_rate
    try:
        try:
            return timm.create_model(options.name, **arguments, drop_path_rate=rate, **options.args)
        except TypeError as error:
            if "unexpected" not in str(error) or "'drop_path_rate'" not in str(error):
                raise
            if rate > 0:
                raise ConfigError(
                    f"model.drop_path_rate must be 0 for {options.name}, which has no stochastic "
                    f"depth, got {rate}"
                ) from error
            return timm.create_model(options.name, **arguments, **options.args)
    except ConfigError:
        raise
    except Exception as error:  # models raise errors of any type for unsuitable arguments
        raise ConfigError(
            f"model.args={options.args} cannot be used with model.name={options.name}: "
            f"{one_line(error)}"
        ) from error


@torch.no_grad()
def check_model(
    model: nn.Module,
    image_size: int,
    num_classes: int,
    *,
    name: str = "the model",
    setting: str = "data.image_size",
) -> None:
    """Check that a model classifies images by running it on a blank one.

    Args:
        model: Model on the device where it will run; its training mode is preserved.
        image_size: Height and width in pixels.
        num_classes: Expected number of logits.
        name: Name of the model in error messages.
        setting: Setting of the image size.

    Raises:
        ConfigError: If the model does not accept the image or returns another shape.
    """
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    try:
        logits = model(torch.zeros(1, 3, image_size, image_size, device=device))
        shape = tuple(logits.shape)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{name} does not accept images of {setting}={image_size} with 3 channels: "
            f"{one_line(error)}"
        ) from error
    finally:
        model.train(was_training)
    if shape != (1, num_classes):
        raise ConfigError(
            f"{name} must return (N, {num_classes}) logits for model.num_classes={num_classes}, "
            f"got {shape} for one image"
        )


def find_not_finite(model: nn.Module) -> str | None:
    """Return the name of the first weight that is not finite or buffer that is NaN, or None."""

    def broken(tensor: torch.Tensor, is_weight: bool) -> bool:
        # Infinite buffers can be valid, such as attention masks.
        bad = ~torch.isfinite(tensor) if is_weight else torch.isnan(tensor)
        return bool(bad.any())

    weights = (name for name, tensor in model.named_parameters() if broken(tensor, True))
    buffers = (name for name, tensor in model.named_buffers() if broken(tensor, False))
    return next(itertools.chain(weights, buffers), None)


def _load_initial(
    model: nn.Module, path: str, map_file: str | None, classes: Sequence[str] | None
) -> None:
    class_map = None
    if map_file is not None:
        try:
            class_map = [int(line) for line in Path(map_file).read_text().split()]
        except (OSError, ValueError) as error:
            raise ConfigError(f"model.class_map: cannot read {map_file}: {error}") from error
    try:
        checkpoint = load_checkpoint(fetch_checkpoint(path))
        weights = clean_state_dict(checkpoint)
        names = names_of(checkpoint)
        if names is not None and classes is not None:
            weights, class_map = _match_names(model, weights, class_map, names, list(classes))
        load_weights(model, weights, class_map)
        if name := find_not_finite(model):
            raise ValueError(f"{name} of {path} is not finite")
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.initial_checkpoint: {error}") from error


def _match_names(
    model: nn.Module,
    weights: dict[str, torch.Tensor],
    class_map: list[int] | None,
    names: list[str],
    classes: list[str],
) -> tuple[dict[str, torch.Tensor], list[int] | None]:
    """Adapt weights and class map to a model whose class names differ from the checkpoint's.

    If only the order differs, the rows of the classifier are reordered. If the names differ, it
    stays randomly initialized, as with another number of classes, unless a class map assigns its
    rows.
    """
    given = names if class_map is None else [names[i] for i in class_map if 0 <= i < len(names)]
    difference = describe_other_classes(given, classes)
    if difference is None or len(given) != len(classes):  # load_weights reports another number
        return weights, class_map
    if class_map is not None:
        message = "model.class_map assigns classifier rows of other classes to those of the data"
    elif sorted(names) == sorted(classes):
        message = "classifier rows of model.initial_checkpoint are reordered to match the data"
        class_map = [names.index(name) for name in classes]
    else:
        parts = classifier_names(model)
        prefixes = tuple(f"{part}." for part in parts)
        own = {name: t for name, t in model.state_dict().items() if name.startswith(prefixes)}
        weights = weights | own
        message = (
            f"{' and '.join(parts)} stays randomly initialized, as model.initial_checkpoint "
            "was trained on other classes; set model.class_map to assign its rows"
        )
    _logger.log(on_first(logging.WARNING), "%s (%s)", message, printable(difference))
    return weights, class_map


def trained_settings(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings in a checkpoint of classification.train by section, or an empty dict."""
    config = checkpoint.get("config")
    sections = config if isinstance(config, dict) and isinstance(config.get("model"), dict) else {}
    return {key: value for key, value in sections.items() if isinstance(value, dict)}


def pick_device(name: str) -> torch.device:
    """Return the device with a name; 'auto' selects the accelerator if there is one.

    Raises:
        ConfigError: If the device does not exist.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    found = ["cpu"]
    if accelerator is not None:
        found += [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())]
    if name not in (*found, accelerator and accelerator.type):
        raise ConfigError(f"device must be 'auto' or one of {', '.join(found)}, got '{name}'")
    return torch.device(name)
