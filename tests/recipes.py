"""Helpers for testing the configs of detection and segmentation."""

import copy
import csv
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from flash_internimage.checkpoints import convert_state_dict

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"


def read_recipes(file: str) -> dict[str, dict[str, str]]:
    """Read a table of the published recipes, by config name."""
    with open(DATA / "openmmlab" / file, newline="") as table:
        return {row["config"]: row for row in csv.DictReader(table)}


def plain(value: Any) -> Any:
    """Convert a part of a config to dicts and lists without scopes."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items() if key != "_scope_"}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def without(value: Any, names: set[str]) -> Any:
    """Remove keys from a part of a config at any depth."""
    if isinstance(value, dict):
        return {key: without(item, names) for key, item in value.items() if key not in names}
    if isinstance(value, list):
        return [without(item, names) for item in value]
    return value


def an_eighth(value: Any, key: str = "") -> Any:
    """Scale the image sizes in a pipeline by 1/8."""
    if isinstance(value, Mapping):
        return {key: an_eighth(item, key) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(an_eighth(item, key) for item in value)
    return value // 8 if key in ("scale", "scales", "crop_size") else value


@functools.cache
def load_config(task: str, name: str) -> Config:
    return Config.fromfile(ROOT / "configs" / task / f"{name}.py")


@functools.cache
def build_model(task: str, name: str) -> nn.Module:
    """Build the model of a config on the meta device, in the current scope."""
    with torch.device("meta"):
        # Building modifies the config.
        return MODELS.build(copy.deepcopy(load_config(task, name).model))


def assert_published_backbone(backbone: nn.Module, recipe: dict[str, str]) -> None:
    blocks = [block for level in backbone.levels for block in level.blocks]
    assert len(blocks) == int(recipe["layers"])
    assert blocks[-1].drop_path.drop_prob == pytest.approx(float(recipe["drop_path_rate"]))
    for level in backbone.levels:
        assert level.grad_checkpointing == (recipe["with_cp"] == "yes")
    assert backbone.layer_scale == (None if backbone.depths[2] == 32 else 1.0)  # of H
    assert backbone.init_cfg["type"] == "Pretrained"
    released = timm.get_pretrained_cfg(backbone.init_cfg["checkpoint"])
    assert Path(released.url).stem == recipe["pretrained"]


def published_shapes(recipe: dict[str, str]) -> dict[str, list[int]]:
    """Return the published names and shapes of a released file.

    Those with InternImage are made of the backbone of its classifier and of the parts of the
    FlashInternImage model that the recipe names; the FPN has biases instead of norms.
    """
    file = DATA / "openmmlab_schemas" / f"{recipe['schema']}.json"
    shapes: dict[str, list[int]] = json.loads(file.read_text())
    found = re.search(r"(?<!flash)_internimage_([a-z]+)_", recipe["config"])
    if found is None:
        return shapes
    classifier = DATA / "internimage" / "schemas" / f"cls_{found[1].upper()}.json"
    own: dict[str, list[int]] = json.loads(classifier.read_text())["state_dict"]
    backbone = {
        f"backbone.{name}": shape
        for name, shape in own.items()
        if name.startswith(("patch_embed.", "levels."))
    }
    if found[1] == "t":  # its classifier has no layer scale
        norms = [name for name in backbone if re.search(r"\.blocks\.\d+\.norm\d\.0\.weight$", name)]
        gammas = {re.sub(r"norm(\d)\.0\.weight", r"gamma\1", name): name for name in norms}
        backbone |= {gamma: backbone[name] for gamma, name in gammas.items()}
    stem = "backbone.patch_embed.conv2.weight"
    width, other = backbone[stem][0], shapes[stem][0]
    widths = {other * 2**i: width * 2**i for i in range(4)}
    pooled = 4 * 512  # channels that UPerNet concatenates with the last stage
    widths[8 * other + pooled] = 8 * width + pooled
    wider: dict[int, int] = {}  # sizes that differ in the head of the only Mask2Former, that of H
    if recipe["config"].startswith("mask2former"):
        wider = {256: 1024, 3 * 256: 3 * 1024, 2048: 4096, 8 * 24: 32 * 24, 8 * 12: 32 * 12}
    rest = {name: shape for name, shape in shapes.items() if not name.startswith("backbone.")}
    for name, shape in [*rest.items()]:
        inputs = widths if len(shape) == 4 else {}
        rest[name] = [
            (wider | (inputs if axis == 1 else {})).get(size, size)
            for axis, size in enumerate(shape)
        ]
        if name.startswith("neck.") and ".ln." in name:
            del rest[name]
            rest[name.replace(".ln.weight", ".conv.bias").replace(".ln.bias", ".conv.bias")] = shape
    return backbone | rest


def assert_published_parameters(model: nn.Module, recipe: dict[str, str]) -> None:
    """Compare names, shapes and counts of the parameters."""
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == convert_state_dict(published_shapes(recipe))
    assert len(shapes) == int(recipe["entries"])
    for module, millions in (
        (model, recipe["million_parameters"]),
        (model.backbone, recipe["million_of_backbone"]),
    ):
        assert f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f}" == millions
