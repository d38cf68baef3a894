"""Tests of the conversion of published checkpoints, with the schemas of the released models.

The 1x and 3x models of Mask R-CNN share a schema, as do those of Cascade Mask R-CNN.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flash_internimage.checkpoints import (
    convert_checkpoint,
    convert_state_dict,
    load_checkpoint,
    to_published_checkpoint,
    to_published_state_dict,
)

SCHEMAS = sorted((Path(__file__).parents[1] / "data" / "openmmlab_schemas").glob("*.json"))
RENAMED = {"cascade": 0, "dino": 241, "mask2former": 180, "mask": 0, "upernet": 0}
ALL = pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.stem)
HEAD, DECODE = "bbox_head.transformer", "decode_head"


def schema(path: Path) -> dict[str, list[int]]:
    return json.loads(path.read_text())


def plain(path: Path) -> dict[str, list[int]]:
    return {name: shape for name, shape in schema(path).items() if not name.startswith("ema_")}


def test_every_family_has_schemas():
    assert {path.stem.split("_")[0] for path in SCHEMAS} == set(RENAMED)


@ALL
def test_only_the_expected_names_change_and_no_entry_is_lost(path):
    published = plain(path)
    converted = convert_state_dict(published)
    assert len(published.keys() - converted.keys()) == RENAMED[path.stem.split("_")[0]]
    assert list(converted.values()) == list(published.values())


@ALL
def test_backbone_and_neck_keep_their_names(path):
    published = plain(path)
    kept = {name for name in published if name.startswith(("backbone.", "neck."))}
    assert len(kept) > 300
    assert kept <= convert_state_dict(published).keys()


@ALL
def test_current_names_are_unchanged(path):
    current = convert_state_dict(schema(path))
    assert convert_state_dict(current) == current


@ALL
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "model._orig_mod."])
def test_prefixes_of_wrappers_are_stripped(path, prefix):
    wrapped = {prefix + name: shape for name, shape in schema(path).items()}
    assert convert_state_dict(wrapped) == convert_state_dict(schema(path))


@ALL
def test_published_names_are_restored(path):
    published = {name: name for name in plain(path)}
    restored = to_published_state_dict(convert_state_dict(published))
    assert restored == published
    assert list(restored) == list(published)


@ALL
def test_restoring_published_names_changes_nothing(path):
    assert to_published_state_dict(plain(path)) == plain(path)


def test_buffers_of_averaged_weights_are_dropped():
    [path] = (path for path in SCHEMAS if "with_ema_buffers" in path.stem)
    averaged = {name.replace(".", "_") for name in plain(path)}
    assert {name.removeprefix("ema_") for name in schema(path).keys() - plain(path).keys()} == (
        averaged
    )
    assert convert_state_dict(schema(path)) == plain(path)


def test_only_a_leading_ema_is_dropped():
    names = {"neck.ema_scale": 0, "backbone.levels.0.ema_.bias": 1}
    assert convert_state_dict(names) == names


ENCODER, DECODER = "encoder.layers.0", "decoder.layers.2"
DINO = {
    f"{HEAD}.level_embeds": "level_embed",
    f"{HEAD}.enc_output.weight": "memory_trans_fc.weight",
    f"{HEAD}.enc_output_norm.bias": "memory_trans_norm.bias",
    f"{HEAD}.query_embed.weight": "query_embedding.weight",
    "bbox_head.label_embedding.weight": "dn_query_generator.label_embedding.weight",
    f"{HEAD}.{ENCODER}.attentions.0.value_proj.bias": f"{ENCODER}.self_attn.value_proj.bias",
    f"{HEAD}.{ENCODER}.ffns.0.layers.0.0.weight": f"{ENCODER}.ffn.layers.0.0.weight",
    f"{HEAD}.{ENCODER}.norms.1.weight": f"{ENCODER}.norms.1.weight",
    f"{HEAD}.{DECODER}.attentions.0.attn.in_proj_bias": f"{DECODER}.self_attn.attn.in_proj_bias",
    f"{HEAD}.{DECODER}.attentions.1.value_proj.bias": f"{DECODER}.cross_attn.value_proj.bias",
    f"{HEAD}.{DECODER}.ffns.0.layers.1.bias": f"{DECODER}.ffn.layers.1.bias",
    f"{HEAD}.{DECODER}.norms.2.bias": f"{DECODER}.norms.2.bias",
    f"{HEAD}.decoder.norm.weight": "decoder.norm.weight",
    f"{HEAD}.decoder.ref_point_head.0.weight": "decoder.ref_point_head.layers.0.weight",
    f"{HEAD}.decoder.ref_point_head.2.weight": "decoder.ref_point_head.layers.1.weight",
    "bbox_head.cls_branches.6.bias": "bbox_head.cls_branches.6.bias",
    "bbox_head.reg_branches.0.4.weight": "bbox_head.reg_branches.0.4.weight",
    "neck.extra_convs.0.gn.bias": "neck.extra_convs.0.gn.bias",
}
LEVELS = f"{DECODE}.pixel_decoder"
PIXELS, QUERIES = f"{LEVELS}.encoder.layers.1", f"{DECODE}.transformer_decoder"
LAYER = f"{QUERIES}.layers.8"
MASK2FORMER = {
    f"{PIXELS}.attentions.0.output_proj.weight": f"{PIXELS}.self_attn.output_proj.weight",
    f"{PIXELS}.ffns.0.layers.1.weight": f"{PIXELS}.ffn.layers.1.weight",
    f"{PIXELS}.norms.0.weight": f"{PIXELS}.norms.0.weight",
    f"{LAYER}.attentions.0.attn.in_proj_weight": f"{LAYER}.cross_attn.attn.in_proj_weight",
    f"{LAYER}.attentions.1.attn.in_proj_weight": f"{LAYER}.self_attn.attn.in_proj_weight",
    f"{LAYER}.ffns.0.layers.0.0.bias": f"{LAYER}.ffn.layers.0.0.bias",
    f"{QUERIES}.post_norm.bias": f"{QUERIES}.post_norm.bias",
    f"{DECODE}.query_embed.weight": f"{DECODE}.query_embed.weight",
    f"{DECODE}.query_feat.weight": f"{DECODE}.query_feat.weight",
    f"{DECODE}.level_embed.weight": f"{DECODE}.level_embed.weight",
    f"{LEVELS}.level_encoding.weight": f"{LEVELS}.level_encoding.weight",
    f"{DECODE}.mask_embed.4.bias": f"{DECODE}.mask_embed.4.bias",
}


@pytest.mark.parametrize(
    ("family", "names"), [("dino", DINO), ("mask2former", MASK2FORMER)], ids=["dino", "mask2former"]
)
def test_every_part_gets_its_current_name(family, names):
    for path in SCHEMAS:
        if path.stem.startswith(family):
            published = schema(path)
            assert names.keys() <= published.keys()
            converted = convert_state_dict({name: name for name in published})
            assert {name: new for new, name in converted.items() if name in names} == names


@pytest.mark.parametrize(
    ("state_dict", "message"),
    [
        (
            {"neck._orig_mod.weight": 0, "neck.weight": 1},
            r"neck\.weight: neck\._orig_mod\.weight and neck\.w",
        ),
        (
            {f"{HEAD}.level_embeds": 0, "level_embed": 1},
            f"level_embed: {HEAD}.level_embeds and level_embed",
        ),
        ({f"{HEAD}.reference_points.weight": 0}, f"unknown to .*: {HEAD}.reference_points.weight"),
        ({f"{HEAD}.encoder.layers.0.attentions.1.x": 0}, "unknown to .*attentions.1.x"),
        ({f"{LAYER}.attentions.2.x": 0}, "unknown to .*attentions.2.x"),
        ({f"{LAYER}.ffns.1.x": 0}, "unknown to .*ffns.1.x"),
    ],
)
def test_ambiguous_or_unknown_names_are_errors(state_dict, message):
    with pytest.raises(ValueError, match=message):
        convert_state_dict(state_dict)


@pytest.mark.parametrize(
    "names",
    [
        ("memory_trans_fc.weight", "reference_points_fc.weight"),
        (f"{QUERIES}.query.weight", f"{LAYER}.ffn2.weight", f"{LAYER}.middle.ffn.x"),
    ],
)
def test_restoring_unpublished_names_is_an_error(names):
    with pytest.raises(ValueError, match=f"names unknown to such models: {names[-1]}"):
        to_published_state_dict(dict.fromkeys(names, 0))


# convert_checkpoint, to_published_checkpoint

WEIGHTS = {f"{HEAD}.level_embeds": torch.ones(4, 256), "ema_backbone_weight": torch.zeros(1)}
META = {"epoch": 12, "mmdet_version": "2.28.1", "hook_msgs": {"best": ["bbox_mAP", 0.5, None]}}


def test_weights_are_converted_and_the_optimizer_is_dropped():
    converted = convert_checkpoint({"meta": META, "state_dict": WEIGHTS, "optimizer": {"state": 0}})
    assert converted.keys() == {"state_dict", "meta"}
    assert converted["state_dict"].keys() == {"level_embed"}
    assert converted["state_dict"]["level_embed"] is WEIGHTS[f"{HEAD}.level_embeds"]


@pytest.mark.parametrize("keys", [("CLASSES",), ("CLASSES", "PALETTE")])
def test_classes_and_palette_move_to_dataset_meta(keys):
    dataset = {"CLASSES": ("person", "bicycle"), "PALETTE": [(220, 20, 60), (119, 11, 32)]}
    meta = META | {key: dataset[key] for key in keys}
    converted = convert_checkpoint({"meta": meta, "state_dict": WEIGHTS})["meta"]
    assert converted == META | {"dataset_meta": {key.lower(): dataset[key] for key in keys}}


@pytest.mark.parametrize("meta", [{}, {"meta": None}, {"meta": {}}, {"meta": {"CLASSES": None}}])
def test_metadata_is_optional(meta):
    assert to_published_checkpoint({"state_dict": WEIGHTS, **meta})["meta"] == {}
    assert convert_checkpoint({"state_dict": WEIGHTS, **meta})["meta"] == {}


def test_metadata_other_than_plain_data_is_dropped(tmp_path):
    class Config(dict):
        pass

    foreign = {"config": Config(a=1), "best": np.float64(0.5), "list": [{"x": np.zeros(1)}]}
    converted = convert_checkpoint({"state_dict": WEIGHTS, "meta": {**META, **foreign}})
    assert converted["meta"] == META
    torch.save(converted, tmp_path / "converted.pth")
    assert load_checkpoint(tmp_path / "converted.pth")["meta"] == META


def test_executable_configs_in_the_metadata_are_dropped():
    meta = {**META, "config": "import os", "cfg": "import os"}
    for convert in (convert_checkpoint, to_published_checkpoint):
        assert convert({"state_dict": WEIGHTS, "meta": meta})["meta"] == META


def test_bare_state_dict_is_accepted():
    converted = convert_checkpoint(WEIGHTS)
    assert (converted["state_dict"].keys(), converted["meta"]) == ({"level_embed"}, {})


def test_converting_twice_changes_nothing():
    converted = convert_checkpoint(
        {"state_dict": WEIGHTS, "meta": {**META, "CLASSES": ("a",), "PALETTE": [[0, 0, 0]]}}
    )
    assert convert_checkpoint(converted) == converted


@pytest.mark.parametrize(
    "checkpoint",
    [{"state_dict": None}, {"state_dict": [1]}, {"model": WEIGHTS, "epoch": 1}],
    ids=["none", "list", "classifier"],
)
def test_checkpoint_without_a_state_dict_is_an_error(checkpoint):
    with pytest.raises(ValueError, match=f"got the entries {', '.join(checkpoint)}"):
        convert_checkpoint(checkpoint)


@pytest.mark.parametrize("dataset", [{}, {"CLASSES": ("a",)}, {"CLASSES": ("a",), "PALETTE": [0]}])
def test_a_published_container_is_restored(dataset):
    weights = {f"{HEAD}.level_embeds": 1, f"{HEAD}.enc_output.bias": 2, "neck.convs.0.gn.bias": 3}
    published = {"state_dict": weights, "meta": META | dataset}
    assert to_published_checkpoint(convert_checkpoint(published)) == published
    assert to_published_checkpoint(published) == published
