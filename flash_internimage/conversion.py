"""Convert checkpoints of the published detectors (mmdet 2) and segmentors (mmseg 0) and back.

The parameter names of Mask R-CNN, Cascade Mask R-CNN and UPerNet are the same in current OpenMMLab.
In DINO and Mask2Former, some modules were renamed or moved from the head to the detector.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

# Prefixes that wrappers add to all names of a model, and what torch inserts anywhere in them.
_WRAPPERS = ("module.", "model.", "net.", "timm_model.", "body.", "graph_module.")
_INSERTED = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Counters that the averaged models of torch and mmengine store next to the weights.
_COUNTERS = ("n_averaged", "steps")
# Configs in the `meta` of a checkpoint: strings that OpenMMLab's programs execute as Python.
EXECUTED = ("cfg", "config")

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


class _Names(NamedTuple):
    """Published or current parameter names of a family of models."""

    beginning: str  # prefix by which these names are recognised
    others: str  # pattern of names that only exist on the other side


class _Family(NamedTuple):
    table: tuple[tuple[str, str], ...]
    published: _Names
    current: _Names


_FAMILIES = (
    _Family(
        _DINO,
        _Names("bbox_head.transformer.", r"^(?!backbone\.|neck\.|bbox_head\.)"),
        _Names("memory_trans_fc.", r"^bbox_head\.transformer\."),
    ),
    _Family(
        _MASK2FORMER,
        _Names(
            "decode_head.transformer_decoder.", r"^decode_head\..*\.(self_attn|cross_attn|ffn)\."
        ),
        _Names("decode_head.transformer_decoder.", r"^decode_head\..*\.(attentions|ffns)\."),
    ),
)


def unwrap_names(names: Mapping[str, str]) -> dict[str, str]:
    """Map the names in a state dict to parameter names of the model without its wrappers.

    `module.`, `model.` and other prefixes of parallel training, averaging, Lightning, transformers
    and timm are stripped, in any order, if all names have them. `_orig_mod.` of torch.compile and
    similar insertions are removed everywhere. If a prefix is stripped, the counters of averaged
    models are left out. The `ema_*` buffers of mmcv are always left out: if a file has them, the
    plain names contain the averaged weights and the buffers the trained ones.

    Args:
        names: Current name of each entry by its name in the file.

    Returns:
        Name in the model of each remaining entry by its name in the file.
    """
    names = {old: _INSERTED.sub("", name) for old, name in names.items()}
    while True:
        names = {old: name for old, name in names.items() if not re.match(r"ema_[^.]*$", name)}
        rest = {old: name for old, name in names.items() if name not in _COUNTERS}
        shared = [p for p in _WRAPPERS if all(name.startswith(p) for name in rest.values())]
        if not (rest and shared):
            return names
        names = {old: name.removeprefix(shared[0]) for old, name in rest.items()}


def rename(state_dict: Mapping[str, T], names: Mapping[str, str]) -> dict[str, T]:
    """Select and rename entries of a state dict.

    Args:
        state_dict: Entries with values of any type.
        names: New name of each entry to keep by its current name.

    Returns:
        The selected entries under their new names.

    Raises:
        ValueError: If two entries get the same name.
    """
    sources: dict[str, str] = {}
    for name, new in names.items():
        if new in sources:
            raise ValueError(f"state_dict has two entries for {new}: {sources[new]} and {name}")
        sources[new] = name
    return {new: state_dict[name] for new, name in sources.items()}


def convert_state_dict(state_dict: Mapping[str, T]) -> dict[str, T]:
    """Rename the entries of a published model to the current names; current names are kept.

    Prefixes of wrappers are stripped, see :func:`unwrap_names`.

    Args:
        state_dict: Entries with values of any type, such as tensors or shapes.

    Returns:
        The entries under their current names.

    Raises:
        ValueError: If two entries get the same name, or a name of DINO or Mask2Former is unknown.
    """
    names = unwrap_names({name: name for name in state_dict})
    for family in _FAMILIES:
        if _is_any_of(family.published, names.values()):
            names = {name: _rename(new, family.table) for name, new in names.items()}
            _require_all_renamed(names, family.published, family.current)
    return rename(state_dict, names)


def restore_state_dict(state_dict: Mapping[str, T]) -> dict[str, T]:
    """Rename the entries of a model of this project to the published names.

    This is the inverse of :func:`convert_state_dict`, which additionally strips prefixes of
    wrappers and drops `ema_*` buffers.

    Args:
        state_dict: Entries with values of any type, such as tensors or shapes.

    Returns:
        The entries under their published names.

    Raises:
        ValueError: If a name of DINO or Mask2Former is unknown.
    """
    names = {name: name for name in state_dict}
    for family in _FAMILIES:
        if _is_any_of(family.current, names):
            table = tuple((current, published) for published, current in family.table)
            names = {name: _rename(new, table) for name, new in names.items()}
            _require_all_renamed(names, family.current, family.published)
    return {new: state_dict[name] for name, new in names.items()}


def _is_any_of(side: _Names, names: Iterable[str]) -> bool:
    return any(name.startswith(side.beginning) for name in names)


def _require_all_renamed(names: Mapping[str, str], old: _Names, new: _Names) -> None:
    unknown = [name for name, renamed in names.items() if re.search(new.others, renamed)]
    if unknown:
        raise ValueError(
            f"state_dict has {old.beginning}* and names unknown to such models: "
            f"{', '.join(unknown[:10])}"
        )


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
        names and colours under `dataset_meta`, and all other metadata that consists of strings,
        numbers and containers of these, except the entries in `EXECUTED`.

    Raises:
        ValueError: If there is no state dict, or it cannot be converted.
    """
    state_dict = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state_dict, Mapping) or any(
        isinstance(value, Mapping) for value in state_dict.values()
    ):
        raise ValueError(
            "checkpoint must have an entry state_dict or be a state dict, got the entries "
            f"{', '.join(map(str, list(checkpoint)[:10]))}"
        )
    meta = {} if state_dict is checkpoint else checkpoint.get("meta") or {}
    if not isinstance(meta, Mapping) or not all(isinstance(name, str) for name in state_dict):
        raise ValueError("state_dict must have text for names, and meta be a dict")
    meta = {
        key: value
        for key, value in meta.items()
        if key not in EXECUTED and value is not None and _is_plain(value)
    }
    dataset_meta = {key.lower(): meta.pop(key) for key in ("CLASSES", "PALETTE") if key in meta}
    if dataset_meta:
        meta["dataset_meta"] = dataset_meta
    return {"state_dict": convert_state_dict(state_dict), "meta": meta}


def restore_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Convert a checkpoint of this project to the format of the published code.

    Args:
        checkpoint: Contents of a file written by mmengine, or a result of
            :func:`convert_checkpoint`.

    Returns:
        Dict with `state_dict`, see :func:`restore_state_dict`, and `meta`.

    Raises:
        ValueError: If there is no state dict, or it cannot be converted.
    """
    checkpoint = convert_checkpoint(checkpoint)
    meta = checkpoint["meta"]
    dataset_meta = meta.pop("dataset_meta", {})
    names = {"CLASSES": "classes", "PALETTE": "palette"}
    meta |= {old: dataset_meta[new] for old, new in names.items() if new in dataset_meta}
    return {"state_dict": restore_state_dict(checkpoint["state_dict"]), "meta": meta}


def _is_plain(value: Any) -> bool:
    """Return whether a value consists of built-in types only.

    Types must match exactly, as NumPy's float64 is a subclass of float.
    """
    if type(value) is dict:
        return all(_is_plain(item) for pair in value.items() for item in pair)
    if type(value) in (list, tuple):
        return all(_is_plain(item) for item in value)
    return value is None or type(value) in (str, int, float, bool)
