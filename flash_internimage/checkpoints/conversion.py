"""Convert checkpoints of the published detectors (mmdet 2) and segmentors (mmseg 0) and back.

The parameter names of Mask R-CNN, Cascade Mask R-CNN and UPerNet are the same in current OpenMMLab.
In DINO and Mask2Former, some modules were renamed or moved from the head to the detector.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from torch import Tensor

from ..files import require_writable, write_atomically
from .loading import load_checkpoint, save_atomically
from .names import T, rename, unwrap_names
from .weights import clean_state_dict, find_mismatches

# Configs in the `meta` of a checkpoint: strings that OpenMMLab's scripts execute as Python.
EXECUTED = ("cfg", "config")

# Prefixes of the parameter names of detectors and segmentors, except the backbone's.
_NOT_IN_CLASSIFIERS = ("neck.", "roi_head.", "bbox_head.", "decode_head.", "memory_trans_fc.")

_HEAD, _PIXELS = "bbox_head.transformer", "decode_head.pixel_decoder.encoder.layers.#"
_QUERIES = "decode_head.transformer_decoder.layers.#"

# Published and current prefixes of names; # matches a number. The first match in a table applies.
_DINO = (
    (f"{_HEAD}.level_embeds", "level_embed"),
    (f"{_HEAD}.enc_output_norm", "memory_trans_norm"),
    (f"{_HEAD}.enc_output", "memory_trans_fc"),
    (f"{_HEAD}.query_embed", "query_embedding"),
    ("bbox_head.label_embedding", "dn_query_generator.label_embedding"),
    (f"{_HEAD}.encoder.layers.#.attentions.0", "encoder.layers.#.self_attn"),
    (f"{_HEAD}.encoder.layers.#.ffns.0", "encoder.layers.#.ffn"),
    (f"{_HEAD}.encoder.layers.#.norms.#", "encoder.layers.#.norms.#"),
    (f"{_HEAD}.decoder.layers.#.attentions.0", "decoder.layers.#.self_attn"),
    (f"{_HEAD}.decoder.layers.#.attentions.1", "decoder.layers.#.cross_attn"),
    (f"{_HEAD}.decoder.layers.#.ffns.0", "decoder.layers.#.ffn"),
    (f"{_HEAD}.decoder.layers.#.norms.#", "decoder.layers.#.norms.#"),
    (f"{_HEAD}.decoder.norm", "decoder.norm"),
    (f"{_HEAD}.decoder.ref_point_head.0", "decoder.ref_point_head.layers.0"),
    # The published module also numbers the ReLU between the two layers.
    (f"{_HEAD}.decoder.ref_point_head.2", "decoder.ref_point_head.layers.1"),
)
# Unlike in DINO, the decoder layers apply cross-attention before self-attention, which swaps the
# numbers. All shapes agree, so nothing else would reveal a mix-up.
_MASK2FORMER = (
    (f"{_PIXELS}.attentions.0", f"{_PIXELS}.self_attn"),
    (f"{_PIXELS}.ffns.0", f"{_PIXELS}.ffn"),
    (f"{_QUERIES}.attentions.0", f"{_QUERIES}.cross_attn"),
    (f"{_QUERIES}.attentions.1", f"{_QUERIES}.self_attn"),
    (f"{_QUERIES}.ffns.0", f"{_QUERIES}.ffn"),
)


class _Family(NamedTuple):
    table: tuple[tuple[str, str], ...]
    published: str  # prefix by which published names are recognized
    only_published: str  # pattern that no converted name matches
    current: str
    only_current: str


_FAMILIES = (
    _Family(
        _DINO,
        published="bbox_head.transformer.",
        only_published=r"^bbox_head\.transformer\.",
        current="memory_trans_fc.",
        only_current=r"^(?!backbone\.|neck\.|bbox_head\.)",
    ),
    _Family(
        _MASK2FORMER,
        published="decode_head.transformer_decoder.",
        only_published=r"^decode_head\..*\.(attentions|ffns)\.",
        current="decode_head.transformer_decoder.",
        only_current=r"^decode_head\..*\.(self_attn|cross_attn|ffn)\.",
    ),
)


def convert_state_dict(state_dict: Mapping[str, T]) -> dict[str, T]:
    """Rename the entries of a published model to the current names; current names are kept.

    Prefixes of wrappers, such as `module.`, are stripped.

    Args:
        state_dict: Entries with values of any type, such as tensors or shapes.

    Returns:
        The entries under their current names.

    Raises:
        ValueError: If two entries get the same name, or a name of DINO or Mask2Former is unknown.
    """
    names = unwrap_names({name: name for name in state_dict})
    for family in _FAMILIES:
        names = _rename_all(names, family.table, family.published, family.only_published)
    return rename(state_dict, names)


def to_published_state_dict(state_dict: Mapping[str, T]) -> dict[str, T]:
    """Rename the entries of a model of this project to the published names.

    This is the inverse of :func:`convert_state_dict`, which additionally strips prefixes of
    wrappers and drops `ema_*` buffers.

    Args:
        state_dict: Entries with values of any type, such as tensors or shapes.

    Returns:
        The entries under their published names.

    Raises:
        ValueError: If two entries get the same name, or a name of DINO or Mask2Former is unknown.
    """
    names = {name: name for name in state_dict}
    for family in _FAMILIES:
        table = tuple((current, published) for published, current in family.table)
        names = _rename_all(names, table, family.current, family.only_current)
    return rename(state_dict, names)


def _rename_all(
    names: dict[str, str], table: tuple[tuple[str, str], ...], prefix: str, old: str
) -> dict[str, str]:
    """Rename the values if any has the prefix; then, none may match the pattern `old`."""
    if not any(name.startswith(prefix) for name in names.values()):
        return names
    names = {key: _rename(name, table) for key, name in names.items()}
    if unknown := [key for key, name in names.items() if re.search(old, name)]:
        raise ValueError(
            f"state_dict contains {prefix}* and names unknown to such models: "
            f"{', '.join(unknown[:10])}"
        )
    return names


def _rename(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for old, new in table:
        pattern = re.escape(old).replace(r"\#", r"(\d+)")
        if match := re.match(rf"{pattern}(?=\.|$)", name):
            for number in match.groups():
                new = new.replace("#", number, 1)
            return new + name[match.end() :]
    return name


def convert_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Convert a published checkpoint to the format of mmengine, without the optimizer state.

    Args:
        checkpoint: Contents of a file with an entry `state_dict`, or a bare state dict.

    Returns:
        Dict with `state_dict`, see :func:`convert_state_dict`, and `meta`, which contains the class
        names and colors under `dataset_meta`, and all other metadata that consists of strings,
        numbers and containers of these, except the entries in `EXECUTED`.

    Raises:
        ValueError: If there is no state dict, or it cannot be converted.
    """
    state_dict = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state_dict, Mapping) or any(
        isinstance(value, Mapping) for value in state_dict.values()
    ):
        raise ValueError(
            "checkpoint must contain a state_dict or be a state dict, got the entries "
            f"{', '.join(map(str, list(checkpoint)[:10]))}"
        )
    meta = {} if state_dict is checkpoint else checkpoint.get("meta") or {}
    if not isinstance(meta, Mapping) or not all(isinstance(name, str) for name in state_dict):
        raise ValueError("the names in state_dict must be strings, and meta must be a dict")
    meta = {
        key: value
        for key, value in meta.items()
        if key not in EXECUTED and value is not None and _is_plain(value)
    }
    dataset_meta = {key.lower(): meta.pop(key) for key in ("CLASSES", "PALETTE") if key in meta}
    if dataset_meta:
        meta["dataset_meta"] = dataset_meta
    return {"state_dict": convert_state_dict(state_dict), "meta": meta}


def to_published_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Convert a checkpoint of this project to the format of the published code.

    Args:
        checkpoint: Contents of a file written by mmengine, or a result of
            :func:`convert_checkpoint`.

    Returns:
        Dict with `state_dict`, see :func:`to_published_state_dict`, and `meta`.

    Raises:
        ValueError: If there is no state dict, or it cannot be converted.
    """
    checkpoint = convert_checkpoint(checkpoint)
    meta = checkpoint["meta"]
    dataset_meta = meta.pop("dataset_meta", {})
    names = {"CLASSES": "classes", "PALETTE": "palette"}
    meta |= {old: dataset_meta[new] for old, new in names.items() if new in dataset_meta}
    return {"state_dict": to_published_state_dict(checkpoint["state_dict"]), "meta": meta}


def _is_plain(value: Any) -> bool:
    """Return whether a value consists of built-in types only.

    Types must match exactly, as NumPy's float64 is a subclass of float.
    """
    if type(value) is dict:
        return all(_is_plain(item) for pair in value.items() for item in pair)
    if type(value) in (list, tuple):
        return all(_is_plain(item) for item in value)
    return value is None or type(value) in (str, int, float, bool)


def convert_file(
    source: str | os.PathLike,
    output: str | os.PathLike,
    expected: Mapping[str, Tensor] | None = None,
    published: bool = False,
    partial: bool = False,
) -> list[str]:
    """Convert a checkpoint file to the current or the published parameter names.

    Args:
        source: Checkpoint of a classifier, detector or segmentor, with current or published names.
        output: File to write, `.safetensors` or `.pth`; the latter contains `state_dict` and
            `meta`. The names and colors of the classes are stored where current OpenMMLab expects
            them or, with `published`, where mmdet 2 and mmseg 0 do.
        expected: State dict of the model that the weights should match. If None, nothing is
            compared.
        published: Write the published names instead of the current ones.
        partial: Write the weights that match even if others do not.

    Returns:
        The mismatches, see :func:`find_mismatches`. If there are any, nothing is written
        unless `partial`.

    Raises:
        ValueError: If the source cannot be read or converted, or `output` is a folder or has
            another suffix.
        FileNotFoundError: If the source or the folder of `output` does not exist.
        OSError: If the folder of `output` cannot be written to.
    """
    output = Path(output)
    check_output(output)
    checkpoint = load_checkpoint(source)
    if _is_from_openmmlab(checkpoint):
        checkpoint = convert_checkpoint(checkpoint)
    else:
        checkpoint = {"state_dict": clean_state_dict(checkpoint), "meta": {}}
    weights = checkpoint["state_dict"]
    if not weights or not all(isinstance(weight, Tensor) for weight in weights.values()):
        raise ValueError(f"{source} must contain weights and nothing else")
    mismatches = [] if expected is None else find_mismatches(expected, weights)
    if mismatches and not partial:
        return mismatches
    if expected is not None:
        checkpoint["state_dict"] = {
            name: weight
            for name, weight in weights.items()
            if name in expected and expected[name].shape == weight.shape
        }
    if published:
        checkpoint = to_published_checkpoint(checkpoint)
    write_checkpoint(checkpoint, output)
    return mismatches


def check_output(output: Path) -> None:
    """Check that :func:`write_checkpoint` can write a file.

    Raises:
        ValueError: If `output` does not end in `.safetensors` or `.pth`, or is a folder.
        FileNotFoundError: If its folder does not exist.
        OSError: If its folder cannot be written to.
    """
    if output.suffix not in (".safetensors", ".pth"):
        raise ValueError(f"output must end in .safetensors or .pth, got {output}")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output must be in an existing folder, got {output}")
    if output.is_dir():
        raise ValueError(f"output must be a file, got the folder {output}")
    require_writable(output.parent, "the folder of output")


def write_checkpoint(checkpoint: Mapping[str, Mapping[str, Any]], output: Path) -> None:
    """Write a checkpoint atomically.

    Args:
        checkpoint: Weights in `state_dict`, and `meta`, which a safetensors file contains as JSON.
        output: File to write, `.safetensors` or `.pth`.
    """
    if output.suffix == ".pth":
        save_atomically(dict(checkpoint), output)
        return
    # safetensors rejects tensors that share memory.
    weights = {name: value.contiguous().clone() for name, value in checkpoint["state_dict"].items()}
    meta = {key: json.dumps(value) for key, value in checkpoint["meta"].items()}
    contents = safetensors.torch.save(weights, {"format": "pt", **meta})
    write_atomically(output, lambda file: file.write(contents))


def _is_from_openmmlab(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint is a detector's or segmentor's, not a classifier's."""
    weights = checkpoint.get("state_dict", checkpoint)
    if not isinstance(weights, Mapping):
        return False
    names = unwrap_names({name: name for name in map(str, weights)})
    return any(name.startswith(_NOT_IN_CLASSIFIERS) for name in names.values())


# Former names of these functions, kept for one release.
restore_checkpoint = to_published_checkpoint
restore_state_dict = to_published_state_dict
