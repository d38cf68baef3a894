"""Checkpoints of the published detectors (mmdet 2) and segmentors (mmseg 0) for current OpenMMLab.

Mask R-CNN, Cascade Mask R-CNN and UPerNet keep their names; DINO and Mask2Former, whose parts moved
from the head to the detector or were named anew, do not.
"""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")

# In both tables the first pattern that matches decides.
_DINO = (
    (r"^bbox_head\.transformer\.level_embeds$", "level_embed"),
    (r"^bbox_head\.transformer\.enc_output_norm\.", "memory_trans_norm."),
    (r"^bbox_head\.transformer\.enc_output\.", "memory_trans_fc."),
    (r"^bbox_head\.transformer\.query_embed\.", "query_embedding."),
    (r"^bbox_head\.label_embedding\.", "dn_query_generator.label_embedding."),
    (
        r"^bbox_head\.transformer\.((?:en|de)coder\.layers\.\d+)\.attentions\.0\.",
        r"\1.self_attn.",
    ),
    (r"^bbox_head\.transformer\.(decoder\.layers\.\d+)\.attentions\.1\.", r"\1.cross_attn."),
    (r"^bbox_head\.transformer\.((?:en|de)coder\.layers\.\d+)\.ffns\.0\.", r"\1.ffn."),
    (r"^bbox_head\.transformer\.((?:en|de)coder\.layers\.\d+\.norms\.\d+)\.", r"\1."),
    (r"^bbox_head\.transformer\.decoder\.norm\.", "decoder.norm."),
    (r"^bbox_head\.transformer\.decoder\.ref_point_head\.0\.", "decoder.ref_point_head.layers.0."),
    # a ReLU, counted then and not now, lies between the two layers
    (r"^bbox_head\.transformer\.decoder\.ref_point_head\.2\.", "decoder.ref_point_head.layers.1."),
)
# Layers of the decoder attend to the image first, those of DINO to the queries first: the numbers
# mean the opposite, and all shapes agree.
_MASK2FORMER = (
    (r"^(decode_head\.pixel_decoder\.encoder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn."),
    (r"^(decode_head\.pixel_decoder\.encoder\.layers\.\d+)\.ffns\.0\.", r"\1.ffn."),
    (r"^(decode_head\.transformer_decoder\.layers\.\d+)\.attentions\.0\.", r"\1.cross_attn."),
    (r"^(decode_head\.transformer_decoder\.layers\.\d+)\.attentions\.1\.", r"\1.self_attn."),
    (r"^(decode_head\.transformer_decoder\.layers\.\d+)\.ffns\.0\.", r"\1.ffn."),
)
# What begins the names of a family, its table, and what none of its current names contains.
_FAMILIES = (
    ("bbox_head.transformer.", _DINO, r"^bbox_head\.transformer\."),
    ("decode_head.transformer_decoder.", _MASK2FORMER, r"^decode_head\..*\.(attentions|ffns)\."),
)


def convert_state_dict(state_dict: Mapping[str, T]) -> dict[str, T]:
    """The entries of a published model under the current names; current names stay.

    Strips the prefix `module.` and drops the `ema_*` buffers: where averaged weights were kept, the
    plain names hold them and the buffers what they were averaged from.

    Args:
        state_dict: entries of any kind, tensors or their shapes.

    Raises:
        ValueError: two names become one, or a name of DINO or Mask2Former is not known.
    """
    names = {name: name.removeprefix("module.") for name in state_dict}
    names = {name: new for name, new in names.items() if not new.startswith("ema_")}
    for beginning, table, outdated in _FAMILIES:
        if any(new.startswith(beginning) for new in names.values()):
            names = {name: _rename(new, table) for name, new in names.items()}
            unknown = [name for name, new in names.items() if re.search(outdated, new)]
            if unknown:
                raise ValueError(
                    f"state_dict has names unknown to the published {beginning}*: "
                    f"{', '.join(unknown[:10])}"
                )
    sources: dict[str, str] = {}
    for name, new in names.items():
        if new in sources:
            raise ValueError(f"state_dict has two entries for {new}: {sources[new]} and {name}")
        sources[new] = name
    return {new: state_dict[name] for new, name in sources.items()}


def _rename(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in table:
        new, count = re.subn(pattern, replacement, name)
        if count:
            return new
    return name


def convert_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A published checkpoint as the current engine reads it, without the optimizer's state.

    Args:
        checkpoint: a file's contents with the entry `state_dict`, or a bare state dict.

    Returns:
        `state_dict`, see :func:`convert_state_dict`, and `meta`: class names and colours under
        `dataset_meta`, and all else that consists of text and numbers.

    Raises:
        ValueError: it holds no state dict, or one that cannot be converted.
    """
    state_dict = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state_dict, Mapping) or any(
        isinstance(value, Mapping) for value in state_dict.values()
    ):
        raise ValueError(
            "checkpoint must have an entry state_dict or be a state dict, got the entries "
            f"{', '.join(list(checkpoint)[:10])}"
        )
    meta = {} if state_dict is checkpoint else checkpoint.get("meta") or {}
    meta = {key: value for key, value in meta.items() if value is not None and _is_plain(value)}
    dataset_meta = {key.lower(): meta.pop(key) for key in ("CLASSES", "PALETTE") if key in meta}
    if dataset_meta:
        meta["dataset_meta"] = dataset_meta
    return {"state_dict": convert_state_dict(state_dict), "meta": meta}


def _is_plain(value: Any) -> bool:
    """Whether a value needs no class of a library, numpy's numbers being subclasses of Python's."""
    if type(value) is dict:
        return all(_is_plain(item) for pair in value.items() for item in pair)
    if type(value) in (list, tuple):
        return all(_is_plain(item) for item in value)
    return value is None or type(value) in (str, int, float, bool)
