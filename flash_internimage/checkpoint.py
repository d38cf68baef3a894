"""Reading checkpoints without executing anything from the file, and writing them atomically."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from . import safe_load
from .downloads import download, hide_secrets
from .files import write_atomically

_logger = logging.getLogger(__name__)

# timm's loader refuses the published files, which hold more than weights. What it passes on in the
# place of the weights says under this name where they are.
SOURCE = "source of the weights"

# Of torch's optimizers, what chooses the implementation and the direction.
_KERNELS = ("foreach", "fused", "capturable", "differentiable", "maximize")

_WEIGHTS = ("state_dict", "model_ema", "model")


def clean_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint under the names of the model.

    Takes the entry `state_dict`, else `model_ema`, else `model`, as the published code does, and
    strips the prefix `module.` of wrappers. Of a detector or segmentor, whose names begin with the
    parts, it takes `backbone.` alone.

    Raises:
        ValueError: there is more than tensors and their names.
    """
    for key in _WEIGHTS:
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    others = [
        str(name)
        for name, value in checkpoint.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if others:
        raise ValueError(f"checkpoint must hold tensors by name, got also {', '.join(others[:10])}")
    weights = {name.removeprefix("module."): tensor for name, tensor in checkpoint.items()}
    backbone = {
        name.removeprefix("backbone."): tensor
        for name, tensor in weights.items()
        if name.startswith("backbone.")
    }
    return backbone or weights


def load_checkpoint(
    path: str | os.PathLike,
    map_location: str | torch.device = "cpu",
) -> dict:
    """Load a checkpoint file: safetensors, or a file of :func:`torch.save`.

    Nothing from the file is executed or imported. Objects other than tensors, numbers, text, numpy
    arrays and containers of these become :class:`~.safe_load.Placeholder`, and the log names their
    types. Hooks of tensors are dropped, and the versions of modules in a state dict.

    Files must have been saved with pickle protocol 2, the default of :func:`torch.save`. Files with
    any of these are refused: sparse, quantized, nested and conjugated tensors, tensors with Python
    attributes, tensors that repeat elements of their storage (:meth:`torch.Tensor.expand`), arrays
    of anything but real numbers, complex numbers, bytearrays, and dicts and sets with tuples as
    keys.

    Args:
        path: File to read.
        map_location: As for :func:`torch.load`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or not a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint not found: {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path, device=str(map_location))
        checkpoint, replaced = safe_load.load(path, map_location)
    except Exception as error:  # the readers raise many kinds for damaged files
        # torch advises to load the file unsafely before it says what is wrong, and after it.
        problem = str(error).rpartition("WeightsUnpickler error: ")[2].strip().split("\n\n")[0]
        problem = " ".join(problem.split())  # some of torch's errors have several lines
        if type(error) is not ValueError:
            problem = f"{type(error).__name__}: {problem}"
        raise ValueError(f"{path} is damaged or no checkpoint: {problem:.500}") from error
    if not isinstance(checkpoint, dict):
        kind = type(checkpoint).__name__
        if isinstance(checkpoint, safe_load.Placeholder):
            kind = checkpoint.name
        raise ValueError(f"{path} holds a {kind}, expected a dict")
    if replaced:
        _logger.info("not restored from %s: %s", path, ", ".join(replaced))
    return checkpoint


def fetch_checkpoint(
    source: str | os.PathLike, offline: bool = False, sha256: str | None = None
) -> Path:
    """Return the local file of a checkpoint, downloading it on first use.

    Args:
        source: A path, an http or https address, or the name and tag of pretrained weights, such as
            'flash_internimage_tiny.in1k'.
        offline: Use the caches only, see :func:`~.downloads.download`.
        sha256: Expected SHA-256 of a download.

    Raises:
        FileNotFoundError: `source` is neither a file nor a name with released weights, or the
            file does not exist there.
        OSError: The download failed, or is not a checkpoint.
        ValueError: The download does not have the expected SHA-256.
    """
    source = str(source)
    # Not Path.is_file, which raises an error for addresses longer than a file name may be.
    if os.path.isfile(source):
        return Path(source)
    released = timm.list_pretrained("flash_internimage*")
    if source in released:
        source = timm.get_pretrained_cfg(source).url
    elif not source.lower().startswith(("http://", "https://")):
        raise FileNotFoundError(
            f"checkpoint not found: {hide_secrets(source)} is neither a file, an address, nor one "
            f"of {', '.join(released)}"
        )
    return download(source, offline, sha256)


def save_atomically(checkpoint: dict, path: str | os.PathLike) -> None:
    """torch.save by :func:`write_atomically`."""
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def check_optimizer(optimizer: Optimizer) -> None:
    """Makes a state that was loaded fit for the next step.

    Which kernels compute it is this run's choice, not the file's, and fused ones trust the shapes.

    Raises:
        ValueError: a tensor is not of its parameter's shape.
    """
    for group in optimizer.param_groups:
        group |= {name: optimizer.defaults[name] for name in _KERNELS if name in optimizer.defaults}
        for parameter in group["params"] if group.get("fused") else []:
            for name, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape not in ((), parameter.shape):
                    raise ValueError(
                        f"{name} of the optimizer is of shape {tuple(value.shape)}, its parameter "
                        f"of {tuple(parameter.shape)}"
                    )


def load_weights(
    model: nn.Module,
    state_dict: dict[str, Tensor],
    class_map: list[int] | None = None,
) -> None:
    """Loads a classifier's weights in place; all names must match.

    Args:
        model: a timm model.
        state_dict: weights under the model's names.
        class_map: for each class of the model, its index in the checkpoint's classifier. Without
            it a classifier of another size keeps its initial values, and a warning says so.

    Raises:
        ValueError: a name is missing, unexpected or of another shape, or an index out of range.
    """
    classifier = model.pretrained_cfg["classifier"]
    state_dict = dict(state_dict)
    own = model.state_dict()
    names = [f"{classifier}.{kind}" for kind in ("weight", "bias") if f"{classifier}.{kind}" in own]
    for name in names:
        if name not in state_dict or (
            class_map is None and state_dict[name].shape == own[name].shape
        ):
            continue
        classes = state_dict[name].shape[0]
        if class_map is None:
            _logger.warning(
                "%s starts anew: the checkpoint has %d classes, the model %d",
                name, classes, own[name].shape[0],
            )  # fmt: skip
            state_dict[name] = own[name]
        elif len(class_map) != own[name].shape[0] or not all(0 <= i < classes for i in class_map):
            raise ValueError(
                f"class_map must hold {own[name].shape[0]} indices below {classes}, got "
                f"{len(class_map)} from {min(class_map, default=None)} to "
                f"{max(class_map, default=None)}"
            )
        else:
            state_dict[name] = state_dict[name][class_map]
    require_fit(own, state_dict)
    model.load_state_dict(state_dict)


def read_pretrained(
    state_dict: Mapping[str, Any], model: nn.Module, features_only: bool
) -> dict[str, Tensor]:
    """timm's filter of pretrained weights; timm then adapts stem and classifier, if need be.

    Args:
        state_dict: weights, or where they are: an argument of :func:`fetch_checkpoint` as `SOURCE`.
        model: that is about to have them.
        features_only: whether its classifier will be dropped.

    Raises:
        ValueError: what timm does not adapt is missing, unexpected or of another shape.
    """
    model.pretrained_cfg.pop("state_dict", None)  # it would stay as long as the model
    if SOURCE in state_dict:
        state_dict = load_checkpoint(fetch_checkpoint(state_dict[SOURCE]))
    weights = clean_state_dict(state_dict)
    adapted = ("head.", "patch_embed.conv1.weight", *(["conv_head."] if features_only else []))
    own, given = (
        {name: tensor for name, tensor in entries.items() if not name.startswith(adapted)}
        for entries in (model.state_dict(), weights)
    )
    require_fit(own, given)
    classes = len(weights.get("head.weight", ()))
    if classes and not features_only and model.num_classes not in (0, classes):
        _logger.warning(
            "head starts anew: the checkpoint has %d classes, the model %d",
            classes, model.num_classes,
        )  # fmt: skip
    return weights


def find_misfits(expected: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> list[str]:
    """What keeps weights from a model: each name that is missing, unexpected or of another shape.

    Args:
        expected: the model's own entries.
        state_dict: the weights.

    Raises:
        ValueError: The weights are not a dict.
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"weights must be tensors by name, got a {type(state_dict).__name__}")
    common = {name: value for name, value in state_dict.items() if name in expected}
    return [
        *(f"missing: {name}" for name in expected if name not in state_dict),
        *(f"unexpected: {name}" for name in state_dict if name not in expected),
        *(
            f"no tensor: {name} is a {type(value).__name__}"
            for name, value in common.items()
            if not isinstance(value, Tensor)
        ),
        *(
            f"shape of {name}: {tuple(value.shape)}, expected {tuple(expected[name].shape)}"
            for name, value in common.items()
            if isinstance(value, Tensor) and value.shape != expected[name].shape
        ),
        # load_state_dict would cast quantized and complex weights in silence.
        *(
            f"dtype of {name}: {value.dtype}, expected {expected[name].dtype}"
            for name, value in common.items()
            if isinstance(value, Tensor)
            and expected[name].is_floating_point()
            and not value.is_floating_point()
        ),
    ]


def require_fit(expected: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> None:
    """
    Raises:
        ValueError: :func:`find_misfits` finds some; the message lists them.
    """
    problems = find_misfits(expected, state_dict)
    if problems:
        more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"the checkpoint does not fit the model: {'; '.join(problems[:10])}{more}")
