"""Read checkpoints without executing anything from the file, and load their weights."""

import logging
import os
import re
from collections.abc import Mapping
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer

from . import safe_load
from .conversion import rename, unwrap_names
from .downloads import download, hide_secrets
from .files import write_atomically

_logger = logging.getLogger(__name__)

# timm's loader refuses the published files, which hold more than weights. What it passes on in the
# place of the weights says under this name where they are.
SOURCE = "source of the weights"

# Of torch's optimizers, what chooses the implementation and the direction.
_KERNELS = ("foreach", "fused", "capturable", "differentiable", "maximize")

# Entries in which programs keep averaged weights, and those from which they were averaged.
_AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict")
_AVERAGED += ("ema_model", "ema")
_OTHER_AVERAGED = re.compile(r"(^|_)(ema|swa|avg|averaged?)(_|$)")
_TRAINED = ("state_dict", "model", "model_state_dict", "module", "net")
# Parts of a model, such as a LightningModule, that are its averaged weights.
_AVERAGED_PARTS = ("ema_model.", "model_ema.", "ema.")


def clean_state_dict(checkpoint: Mapping[str, Any], use_ema: bool = True) -> dict[str, Tensor]:
    """Return the weights of a checkpoint under the names of the model.

    The containers of timm, torchvision, OpenMMLab, Lightning and DeepSpeed are known, and a choice
    among several weights is logged. The prefixes of wrappers are stripped, see
    :func:`~.conversion.unwrap_names`. Of a detector or segmentor, whose names begin with the parts,
    `backbone.` alone is taken.

    Args:
        checkpoint: Contents of a file, or a state dict.
        use_ema: Whether to take averaged weights if there are any, or those that were averaged.

    Raises:
        ValueError: There is more than tensors and their names, or two names become one.
    """
    while entry := _choose_entry(checkpoint, use_ema):
        checkpoint = checkpoint[entry]
    others = [
        str(name)
        for name, value in checkpoint.items()
        if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if others:
        raise ValueError(f"checkpoint must hold tensors by name, got also {', '.join(others[:10])}")
    names = unwrap_names({name: name for name in checkpoint})
    for parts, wanted in ((_AVERAGED_PARTS, use_ema), (("backbone.",), True)):
        part = {old: name for old, name in names.items() if name.startswith(parts) == wanted}
        if part and len(part) < len(names):
            kind = ("those of" if wanted else "none of") + f" {' '.join(parts)}"
            _logger.info("taking %d of %d tensors, %s", len(part), len(names), kind)
        if part and wanted:
            part = {old: name.partition(".")[2] for old, name in part.items()}
        names = unwrap_names(part) if part else names
    return rename(checkpoint, names)


def _choose_entry(checkpoint: Mapping[str, Any], use_ema: bool) -> str | None:
    """Return the entry with the wanted weights; None if the checkpoint itself is the weights."""
    state_dicts = {name: _names_in(value) for name, value in checkpoint.items()}
    state_dicts = {name: names for name, names in state_dicts.items() if names}
    averaged = (*_AVERAGED, *(n for n in state_dicts if _OTHER_AVERAGED.search(str(n).lower())))
    averaged, trained = tuple(dict.fromkeys(averaged)), _TRAINED
    if isinstance(meta := checkpoint.get("meta"), Mapping) and "mmengine_version" in meta:
        averaged, trained = ("state_dict",), ("ema_state_dict",)  # its hook exchanges the two
    entries = [*averaged, *trained] if use_ema else [*trained, *averaged]
    entries = [name for name in entries if checkpoint.get(name) is not None]
    found = [name for name in entries if isinstance(checkpoint[name], Mapping)]
    found = [name for name in found if checkpoint[name]] or found
    if not found:
        return None
    if entries[0] != found[0] and not isinstance(checkpoint[entries[0]], Tensor):
        kind = type(checkpoint[entries[0]]).__name__
        _logger.warning("taking %s: %s is a %s without weights", found[0], entries[0], kind)
    elif others := [*found[1:], *_same_names(state_dicts, found)]:
        _logger.info("taking %s, not %s", found[0], " or ".join(others))
    return found[0]


def _names_in(value: Any) -> set[str]:
    """Return the names of the model's parts in a state dict, of anything else none."""
    if not isinstance(value, Mapping):
        return set()
    if not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items()):
        return set()
    return {*unwrap_names({name: name for name in value}).values()}


def _same_names(state_dicts: Mapping[str, set[str]], found: list[str]) -> list[str]:
    """Return the state dicts that could be meant as well as the one found."""
    chosen = state_dicts.get(found[0])
    others = (name for name in state_dicts if name not in found)
    return [str(name) for name in others if state_dicts[name] == chosen]


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
        if isinstance(error, LookupError):  # It says no more than a number.
            problem = "its pickle is incomplete"
        elif type(error) is not ValueError:
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
    source: str | os.PathLike,
    offline: bool = False,
    sha256: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Path:
    """Return the local file of a checkpoint, downloading it on first use.

    Args:
        source: A path, an http or https address, or the name and tag of pretrained weights, such as
            'flash_internimage_tiny.in1k'.
        offline: Use the caches only, see :func:`~.downloads.download`.
        sha256: Expected SHA-256 of a download.
        cache_dir: Folder of downloads in the place of the caches.

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
    return download(source, offline, sha256, cache_dir)


def save_atomically(checkpoint: dict, path: str | os.PathLike) -> None:
    """Save with :func:`torch.save` by :func:`write_atomically`."""
    write_atomically(path, lambda file: torch.save(checkpoint, file))


def check_optimizer(optimizer: Optimizer) -> None:
    """Validate a restored optimizer state and keep this run's kernel flags.

    Fused kernels trust the shapes of the state.

    Raises:
        ValueError: A tensor is not of its parameter's shape.
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
    """Load a classifier's weights in place; all names must match.

    Args:
        model: A timm model.
        state_dict: Weights under the model's names.
        class_map: For each class of the model, its index in the checkpoint's classifier. Without
            it a classifier of another size keeps its initial values, and a warning says so.

    Raises:
        ValueError: A name is missing, unexpected or of another shape, or an index out of range.
    """
    state_dict, own = dict(state_dict), model.state_dict()
    classifiers = model.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    for classifier in classifiers:
        names = [name for name in (f"{classifier}.weight", f"{classifier}.bias") if name in own]
        sizes = {_first_size(state_dict.get(name)) for name in names}
        classes, expected = max(sizes, default=0), max((len(own[n]) for n in names), default=0)
        if len(sizes) != 1 or not classes or (class_map is None and classes == expected):
            continue  # What does not fit is an error below.
        if class_map is None:
            _warn_of_initial_values(classifier, classes, expected)
            state_dict |= {name: own[name] for name in names}
        elif len(class_map) != expected or not all(0 <= i < classes for i in class_map):
            raise ValueError(
                f"class_map must hold {expected} indices below {classes}, got {len(class_map)} "
                f"from {min(class_map, default=None)} to {max(class_map, default=None)}"
            )
        else:
            state_dict |= {name: state_dict[name][class_map] for name in names}
    require_fit(own, state_dict)
    model.load_state_dict(state_dict)


def _first_size(tensor: Any) -> int:
    return len(tensor) if isinstance(tensor, Tensor) and tensor.dim() else 0


def _warn_of_initial_values(name: str, classes: int, expected: int) -> None:
    _logger.warning(
        "%s keeps its initial values: the checkpoint has %s classes, the model %d",
        name, classes or "no", expected,
    )  # fmt: skip


def read_pretrained(
    state_dict: Mapping[str, Any],
    model: nn.Module,
    features_only: bool = False,
    strict: bool = True,
    cache_dir: str | os.PathLike | None = None,
) -> dict[str, Tensor]:
    """Return pretrained weights for timm, which then adapts the stem to other input channels.

    The classifier keeps its initial values, with a warning, where the model has another number of
    classes than both the weights and the pretrained config.

    Args:
        state_dict: Weights, or where they are: a source for :func:`fetch_checkpoint` as `SOURCE`.
        model: FlashInternImage, with the pretrained config by which timm goes on.
        features_only: Whether the classifier will be dropped.
        strict: Whether missing and unexpected names are errors, not warnings.
        cache_dir: See :func:`fetch_checkpoint`.

    Raises:
        ValueError: The weights do not fit.
    """
    cfg, own = model.pretrained_cfg, model.state_dict()
    cfg.pop("state_dict", None)  # It would stay as long as the model.
    if any(tensor.is_meta for tensor in own.values()):
        raise ValueError("device must not be meta with pretrained=True: it holds no weights")
    if SOURCE in state_dict:
        source = fetch_checkpoint(state_dict[SOURCE], cache_dir=cache_dir)
        state_dict = load_checkpoint(source)
    weights = clean_state_dict(state_dict)
    classes = _first_size(weights.get("head.weight"))

    expected, stem = dict(own), weights.get(stem_name := f"{cfg['first_conv']}.weight")
    if stem is not None and stem.dim() == 4:
        cfg["input_size"] = (stem.shape[1], *cfg["input_size"][1:])
        expected[stem_name] = own[stem_name][:, :1].expand(-1, stem.shape[1], -1, -1)
    fresh = _fresh_parts(model, classes, features_only)
    expected, weights = (
        {name: tensor for name, tensor in entries.items() if not name.startswith(fresh)}
        for entries in (expected, weights)
    )
    if not strict:
        names = expected.keys() ^ weights.keys()
        if names:
            _logger.warning("%d names do not fit: %s", len(names), _shorten(sorted(names)))
        expected, weights = (
            {name: tensor for name, tensor in entries.items() if name not in names}
            for entries in (expected, weights)
        )
    require_fit(expected, weights)
    if broken := [name for name, tensor in weights.items() if not is_finite(tensor)]:
        raise ValueError(f"weights must be finite, those of {_shorten(broken)} are not")
    if model.num_classes and not features_only and "head." in fresh:
        _warn_of_initial_values("head", classes, model.num_classes)
    return own | weights


def is_finite(tensor: Tensor) -> bool:
    """Return whether all elements are finite, in 8-bit floats too."""
    if tensor.is_floating_point() and tensor.element_size() == 1:
        tensor = tensor.float()  # which torch.isfinite does not take
    return bool(tensor.isfinite().all())


def _fresh_parts(model: nn.Module, classes: int, features_only: bool) -> tuple[str, ...]:
    """Return the prefixes of the parts that take nothing from weights of so many classes."""
    cfg = model.pretrained_cfg
    if features_only:
        return ("head.", "conv_head.")
    if model.num_classes == 0:
        return ("head.",)
    if classes == model.num_classes:
        cfg["num_classes"] = classes  # Else timm would drop a classifier that fits.
    elif cfg["num_classes"] != model.num_classes:
        return ("head.",)
    return ()


def find_misfits(expected: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> list[str]:
    """Return what keeps weights from a model: names that are missing, unexpected or do not fit.

    Args:
        expected: The model's own entries.
        state_dict: The weights.

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
    """Require that weights fit a model.

    Raises:
        ValueError: :func:`find_misfits` finds some; the message lists five of each kind.
    """
    problems = find_misfits(expected, state_dict)
    if problems:
        kinds = groupby(problems, key=lambda problem: problem.split(maxsplit=1)[0])
        shown = [problem for _, kind in kinds for problem in islice(kind, 5)]
        more = f" and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
        raise ValueError(f"the checkpoint does not fit the model: {'; '.join(shown)}{more}")


def _shorten(items: list[str]) -> str:
    more = f" and {len(items) - 10} more" if len(items) > 10 else ""
    return "; ".join(items[:10]) + more
