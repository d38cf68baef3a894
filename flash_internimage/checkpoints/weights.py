"""Select the weights in a checkpoint and load them into models."""

import logging
import os
import re
from collections.abc import Mapping
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .loading import fetch_checkpoint, load_checkpoint
from .names import rename, unwrap_names

if TYPE_CHECKING:
    from ..backbones import Backbone

_logger = logging.getLogger(__name__)

# timm's loader rejects the published files, which contain more than weights. In place of a state
# dict, it is given a dict with this key, whose value is the path or URL of the file.
SOURCE = "source of the weights"

# Prefixes of the parameters after the last stage; the last three are those of InternImage-H and -G.
HEAD = ("head.", "conv_head.", "dcnv3_head_", "clip_projector.", "fc_norm.")

# Keys under which programs store averaged (EMA) weights, and the trained weights.
_AVERAGED: tuple[str, ...] = ("state_dict_ema", "model_ema", "ema_state_dict")
_AVERAGED += ("model_ema_state_dict", "ema_model", "ema")
_OTHER_AVERAGED = re.compile(r"(^|_)(ema|swa|avg|averaged?)(_|$)")
_TRAINED: tuple[str, ...] = ("state_dict", "model", "model_state_dict", "module", "net")
# The layer scale of InternImage in the format of transformers.
_LAYER_SCALE = re.compile(r"^(levels\.\d+\.blocks\.\d+\.)layer_scale([12])$")
# Submodules with averaged weights, for example of a LightningModule.
_AVERAGED_PARTS = ("ema_model.", "model_ema.", "ema.")


def clean_state_dict(
    checkpoint: Mapping[str, Any], use_ema: bool = True, prefix: str | None = None
) -> dict[str, Tensor]:
    """Return the weights in a checkpoint under the parameter names of the model.

    The formats of timm, torchvision, OpenMMLab, Lightning and DeepSpeed are recognized, and that of
    transformers for InternImage. If a
    checkpoint contains several sets of weights, the choice is logged. Prefixes of
    wrappers, such as `module.`, are stripped. From a detector or segmentor, only the parameters of
    its `backbone.` are returned.

    Args:
        checkpoint: Contents of a checkpoint file, or a bare state dict.
        use_ema: Whether to prefer averaged (EMA) or trained weights if the checkpoint has both.
        prefix: Prefix of the names to take, for a model that is part of another, such as
            'student.backbone'. It is removed; the dot at its end may be omitted.

    Raises:
        ValueError: If there is anything other than named tensors, no name begins with `prefix`, or
            two entries get the same name.
    """
    while entry := _choose_entry(checkpoint, use_ema):
        checkpoint = checkpoint[entry]
    others = [
        str(name)
        for name, value in checkpoint.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if others:
        raise ValueError(f"checkpoint must contain only tensors, got also {', '.join(others[:10])}")
    if prefix:
        checkpoint = _part(checkpoint, prefix.removesuffix(".") + ".")
    names = unwrap_names({name: name for name in checkpoint})
    for parts, wanted in ((_AVERAGED_PARTS, use_ema), (("backbone.",), True)):
        part = {old: name for old, name in names.items() if name.startswith(parts) == wanted}
        if part and len(part) < len(names):
            kind = f"those {'in' if wanted else 'not in'} {', '.join(parts)}"
            _logger.info("using %d of %d tensors: %s", len(part), len(names), kind)
        if part and wanted:
            part = {old: name.partition(".")[2] for old, name in part.items()}
        names = unwrap_names(part) if part else names
    return rename(checkpoint, {old: _LAYER_SCALE.sub(r"\1gamma\2", n) for old, n in names.items()})


def _part(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries whose names begin with `prefix`, without it."""
    plain = {name: name for name in state_dict}
    for names in (plain, unwrap_names(plain)):
        part = {old: name for old, name in names.items() if name.startswith(prefix)}
        if part:
            return rename(state_dict, {old: n.removeprefix(prefix) for old, n in part.items()})
    found = sorted({name.partition(".")[0] for name in state_dict})
    raise ValueError(
        "prefix must match names in the checkpoint, which begin with "
        f"{', '.join(found[:10])}, got {prefix!r}"
    )


def _choose_entry(checkpoint: Mapping[str, Any], use_ema: bool) -> str | None:
    """Return the key of the wanted weights; None if the checkpoint itself is a state dict."""
    state_dicts = {name: _names_in(value) for name, value in checkpoint.items()}
    state_dicts = {name: names for name, names in state_dicts.items() if names}
    averaged = (*_AVERAGED, *(n for n in state_dicts if _OTHER_AVERAGED.search(str(n).lower())))
    averaged, trained = tuple(dict.fromkeys(averaged)), _TRAINED
    if isinstance(meta := checkpoint.get("meta"), Mapping) and "mmengine_version" in meta:
        averaged, trained = ("state_dict",), ("ema_state_dict",)  # its EMAHook swaps the two
    entries = [*averaged, *trained] if use_ema else [*trained, *averaged]
    entries = [name for name in entries if checkpoint.get(name) is not None]
    found = [name for name in entries if isinstance(checkpoint[name], Mapping)]
    found = [name for name in found if checkpoint[name]] or found
    if not found:
        return None
    if entries[0] != found[0] and not isinstance(checkpoint[entries[0]], Tensor):
        kind = type(checkpoint[entries[0]]).__name__
        _logger.warning("using %s: %s is a %s without weights", found[0], entries[0], kind)
    elif others := [*found[1:], *_same_names(state_dicts, found)]:
        _logger.info("using %s, ignoring %s", found[0], ", ".join(map(str, others)))
    return found[0]


def _names_in(value: Any) -> set[str]:
    """Return the unwrapped parameter names of a state dict, or an empty set for other values."""
    if not isinstance(value, Mapping):
        return set()
    if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items()):
        return set()
    return {*unwrap_names({name: name for name in value}).values()}


def _same_names(state_dicts: Mapping[str, set[str]], found: list[str]) -> list[str]:
    """Return the keys of other state dicts with the same parameter names as the chosen one."""
    chosen = state_dicts.get(found[0])
    others = (name for name in state_dicts if name not in found)
    return [str(name) for name in others if state_dicts[name] == chosen]


def load_weights(
    model: nn.Module,
    state_dict: dict[str, Tensor],
    class_map: list[int] | None = None,
) -> None:
    """Load the weights of a classifier in place; all names must match.

    Args:
        model: timm model.
        state_dict: Weights under the model's parameter names.
        class_map: Index in the checkpoint's classifier for each class of the model. If None, a
            classifier of another size stays randomly initialized, with a warning.

    Raises:
        ValueError: If a parameter is missing, unexpected or of another shape, or an index is out of
            range.
    """
    state_dict, own = dict(state_dict), model.state_dict()
    for classifier in classifier_names(model):
        names = [name for name in (f"{classifier}.weight", f"{classifier}.bias") if name in own]
        sizes = {first_size(state_dict.get(name)) for name in names}
        classes, expected = max(sizes, default=0), max((len(own[n]) for n in names), default=0)
        if len(sizes) != 1 or not classes or (class_map is None and classes == expected):
            continue  # check_state_dict reports any mismatch.
        if class_map is None:
            _warn_of_random_classifier(classifier, classes, expected)
            state_dict |= {name: own[name] for name in names}
        elif len(class_map) != expected or not all(0 <= i < classes for i in class_map):
            raise ValueError(
                f"class_map must contain {expected} indices below {classes}, got {len(class_map)} "
                f"from {min(class_map, default=None)} to {max(class_map, default=None)}"
            )
        else:
            state_dict |= {name: state_dict[name][class_map] for name in names}
    check_state_dict(own, state_dict)
    model.load_state_dict(state_dict)


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the last layers of a timm model: one, several if distilled, or none."""
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    if names := cfg.get("classifier"):
        return (names,) if isinstance(names, str) else tuple(names)
    # Models that are registered without a pretrained config.
    get_classifier: Any = getattr(model, "get_classifier", lambda: None)
    classifier = get_classifier()
    if not isinstance(classifier, nn.Module) or next(classifier.parameters(), None) is None:
        return ()  # such as nn.Identity
    return tuple(name for name, module in model.named_modules() if module is classifier)


def first_size(tensor: Any) -> int:
    """Return the first size of a tensor, such as the number of classes; 0 if there is none."""
    return len(tensor) if isinstance(tensor, Tensor) and tensor.dim() else 0


def _warn_of_random_classifier(name: str, classes: int, expected: int) -> None:
    _logger.warning(
        "%s stays randomly initialized: the checkpoint has %s classes, the model %d",
        name, classes or "no", expected,
    )  # fmt: skip


def read_pretrained(
    state_dict: Mapping[str, Any],
    model: "Backbone",
    features_only: bool = False,
    strict: bool = True,
    cache_dir: str | os.PathLike | None = None,
) -> dict[str, Tensor]:
    """Return pretrained weights in the form that timm loads.

    timm then adapts the first convolution to other numbers of input channels. The classifier stays
    randomly initialized, with a warning, if its number of classes differs from both the weights and
    the pretrained config.

    Args:
        state_dict: Weights, or a dict with a source for :func:`fetch_checkpoint` under `SOURCE`.
        model: The model. Its pretrained config, which timm uses afterwards, is updated.
        features_only: Whether the head will be removed.
        strict: Raise an error for missing and unexpected names instead of logging a warning.
        cache_dir: See :func:`fetch_checkpoint`.

    Returns:
        State dict with all parameters and buffers of the model.

    Raises:
        ValueError: If the weights do not match or are not finite, or the model is on the meta
            device.
    """
    cfg, own = model.pretrained_cfg, model.state_dict()
    cfg.pop("state_dict", None)  # Otherwise, the config keeps the weights in memory.
    if any(tensor.is_meta for tensor in own.values()):
        raise ValueError("device must not be 'meta' with pretrained=True")
    if SOURCE in state_dict:
        source = fetch_checkpoint(state_dict[SOURCE], cache_dir=cache_dir)
        state_dict = load_checkpoint(source)
    weights = clean_state_dict(state_dict)
    classes = first_size(weights.get("head.weight"))

    expected, stem = dict(own), weights.get(stem_name := f"{cfg['first_conv']}.weight")
    if stem is not None and stem.dim() == 4:
        cfg["input_size"] = (stem.shape[1], *cfg["input_size"][1:])
        expected[stem_name] = own[stem_name][:, :1].expand(-1, stem.shape[1], -1, -1)
    fresh = _fresh_parts(model, classes, features_only)
    ignored = {name for name in own.keys() | weights.keys() if name.startswith(fresh)}
    if not strict and (names := (own.keys() ^ weights.keys()) - ignored):
        _logger.warning("%d names do not match: %s", len(names), _shorten(sorted(names)))
        ignored |= names
    for name in ignored:
        expected.pop(name, None)
        weights.pop(name, None)
    check_state_dict(expected, weights)
    check_finite(weights)
    if model.num_classes and not features_only and "head." in fresh:
        _warn_of_random_classifier("head", classes, model.num_classes)
    return own | weights


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Require that all weights are finite.

    Raises:
        ValueError: If some are NaN or infinite.
    """
    if broken := [name for name, tensor in weights.items() if not is_finite(tensor)]:
        raise ValueError(f"weights must be finite, got NaN or infinity in {_shorten(broken)}")


def is_finite(tensor: Tensor) -> bool:
    """Return whether all elements are finite, with support for 8-bit floats."""
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.float()  # unsupported by torch.isfinite
    return bool(tensor.isfinite().all())


def _fresh_parts(model: "Backbone", classes: int, features_only: bool) -> tuple[str, ...]:
    """Return the prefixes of parameters that stay randomly initialized.

    Args:
        model: The model.
        classes: Number of classes of the weights.
        features_only: Whether the head will be removed.
    """
    cfg = model.pretrained_cfg
    if features_only:
        return HEAD
    if model.num_classes == 0:
        return ("head.",)
    if classes == model.num_classes:
        cfg["num_classes"] = classes  # Otherwise timm would drop a classifier that matches.
    elif cfg["num_classes"] != model.num_classes:
        return ("head.",)
    return ()


def find_mismatches(expected: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> list[str]:
    """Return all mismatches between weights and a model.

    Args:
        expected: State dict of the model.
        state_dict: Weights to load.

    Returns:
        One line for each parameter that is missing, unexpected, not a tensor, or of another shape
        or an incompatible dtype.

    Raises:
        ValueError: If the weights are not a dict.
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"weights must be a dict of tensors, got {type(state_dict).__name__}")
    mismatches = [f"missing: {name}" for name in expected if name not in state_dict]
    mismatches += [f"unexpected: {name}" for name in state_dict if name not in expected]
    shapes, dtypes = [], []
    for name in [name for name in state_dict if name in expected]:
        value, own = state_dict[name], expected[name]
        if not isinstance(value, Tensor):
            mismatches.append(f"not a tensor: {name} is of type {type(value).__name__}")
            continue
        if value.shape != own.shape:
            shapes.append(f"shape of {name}: {tuple(value.shape)}, expected {tuple(own.shape)}")
        # load_state_dict would silently cast quantized and complex weights.
        if own.is_floating_point() and not value.is_floating_point():
            dtypes.append(f"dtype of {name}: {value.dtype}, expected {own.dtype}")
    return mismatches + shapes + dtypes


def check_state_dict(expected: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> None:
    """Raise an error if weights do not match a model.

    Args:
        expected: State dict of the model.
        state_dict: Weights to load.

    Raises:
        ValueError: If :func:`find_mismatches` finds any mismatch; the message lists up to five of
            each kind.
    """
    problems = find_mismatches(expected, state_dict)
    if problems:
        kinds = groupby(problems, key=lambda problem: problem.split(maxsplit=1)[0])
        shown = [problem for _, kind in kinds for problem in islice(kind, 5)]
        more = f" and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
        raise ValueError(f"the checkpoint does not match the model: {'; '.join(shown)}{more}")


def _shorten(items: list[str]) -> str:
    more = f" and {len(items) - 10} more" if len(items) > 10 else ""
    return "; ".join(items[:10]) + more
