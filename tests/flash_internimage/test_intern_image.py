"""Tests of InternImage: published values, names, counts and costs, and its options."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import group_parameters
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flash_internimage import InternImage

DATA = Path(__file__).parents[1] / "data" / "internimage"
GOLDENS = sorted(DATA.glob("net_*.npz"))
NAMES = {
    "T": "internimage_tiny",
    "S": "internimage_small",
    "B": "internimage_base",
    "L": "internimage_large",
    "XL": "internimage_xlarge",
    "H": "internimage_huge",
    "G": "internimage_giant",
}
CLIP = {"channels": 16, "depths": (1, 1, 2, 1), "groups": (1, 2, 4, 8), "use_clip_projector": True}
styles = pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
sizes = pytest.mark.parametrize("size", NAMES)

pytestmark = pytest.mark.usefixtures("one_thread")


def load_golden(path: Path) -> tuple[dict[str, Tensor], InternImage]:
    arrays = dict(np.load(path))
    model = InternImage(**json.loads(str(arrays.pop("config_json"))))
    golden = {name: torch.from_numpy(array) for name, array in arrays.items()}
    state_dict = {n.removeprefix("sd."): t for n, t in golden.items() if n.startswith("sd.")}
    assert list(model.state_dict()) == list(state_dict)
    model.load_state_dict(state_dict)
    return golden, model.eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@styles
@torch.no_grad()
def test_outputs_equal_the_published_ones(path, dtype, tolerance, assert_near):
    golden, model = load_golden(path)
    features, maps = model.to(dtype).forward_intermediates(golden["input"].to(dtype))
    actual = {f"feat{i}": feature_map for i, feature_map in enumerate(maps)}
    actual["pooled"] = model.forward_head(features, pre_logits=True)
    actual["logits"] = model(golden["input"].to(dtype))
    for name, tensor in actual.items():
        assert_near(tensor, golden[name], tolerance)


@styles
def test_the_input_gradient_equals_the_published_one(path, assert_near):
    # Only in float64: a sampling point is so close to a pixel that float32 rounds it to the pixel,
    # where the gradient jumps.
    golden, model = load_golden(path)
    x = golden["input"].double().requires_grad_()
    model.double()(x).backward(golden["grad_logits"].double())
    assert_near(x.grad, golden["grad_input"], 1e-9)


@torch.no_grad()
def test_files_in_the_format_of_transformers_are_loaded(tmp_path):
    golden, model = load_golden(DATA / "net_SB_style.npz")
    names = {name: f"model.{name.replace('gamma', 'layer_scale')}" for name in model.state_dict()}
    save_file({names[n]: t for n, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    options = {name: getattr(model, name) for name in ("num_classes", "depths")}
    loaded = timm.create_model(
        "internimage_small",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "model.safetensors"), "num_classes": 10},
        channels=16,
        groups=(1, 2, 4, 8),
        **options,
    ).eval()
    torch.testing.assert_close(loaded(golden["input"]), model(golden["input"]), rtol=0, atol=0)


def meta_model(size: str, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(NAMES[size], **kwargs)


def read_schema(size: str) -> dict:
    return json.loads((DATA / "schemas" / f"cls_{size}.json").read_text())


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@sizes
def test_models_have_the_published_names_shapes_and_counts(size):
    schema = read_schema(size)
    model = meta_model(size, drop_path_rate=schema["constructor_kwargs"]["drop_path_rate"])
    shapes = [(name, list(tensor.shape)) for name, tensor in model.state_dict().items()]
    assert shapes == list(schema["state_dict"].items())
    rates = [getattr(b.drop_path, "drop_prob", 0.0) for level in model.levels for b in level.blocks]
    assert rates == pytest.approx(schema["drop_path_per_block"], abs=1e-8)
    assert count(model) == schema["num_params"]
    model.reset_classifier(21841)
    assert count(model) == schema["num_params_with_21841_classes"]
    model.reset_classifier(0)
    assert count(model) == schema["num_params_excluding_head"]
    assert count(meta_model(size, features_only=True)) == schema["num_params_backbone"]


@pytest.mark.slow
@pytest.mark.parametrize("size", ["T", "H", "G"])
def test_models_cost_the_published_macs(size):
    macs = read_schema(size)["macs"]
    model, resolution = meta_model(size), macs["image_size"]
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, resolution, resolution, device="meta"))
    flops = {str(op): number for op, number in counter.get_flop_counts()["Global"].items()}
    assert flops.pop("ops_dcnv4.dcnv4") == 2 * macs["dcnv3_core_macs"]
    kinds = ("conv_macs", "linear_macs", "attention_macs", "center_feature_scale_macs")
    assert sum(flops.values()) == 2 * sum(macs[kind] for kind in kinds)


def test_the_names_of_released_weights_are_listed():
    names = timm.list_pretrained("internimage_*")
    assert {name.partition(".")[0] for name in names} == {*NAMES.values()}
    resolutions = {n: timm.get_pretrained_cfg(n).input_size[1] for n in names}
    assert resolutions["internimage_huge.joint_in22k_ft_in1k_640"] == 640


def test_attention_pooling_requires_sides_that_are_multiples_of_32():
    model = InternImage(**CLIP)
    assert model(torch.zeros(1, 3, 64, 32)).shape == (1, 1000)
    with pytest.raises(ValueError, match="x must be images whose sides are multiples of 32, got"):
        model(torch.zeros(1, 3, 72, 64))
    backbone = timm.create_model(
        "internimage_huge", features_only=True, level2_post_norm_block_ids=(1,), **CLIP
    )
    assert [f.shape[2] for f in backbone(torch.zeros(1, 3, 72, 64))] == [18, 9, 5, 3]


def test_the_attention_pooling_can_be_left_out():
    model = InternImage(**CLIP)
    model.reset_classifier(0, "")
    assert model(torch.zeros(1, 3, 64, 32)).shape == (1, model.num_features, 4, 2)
    model.reset_classifier(7, "map")
    assert model(torch.zeros(1, 3, 64, 32)).shape == (1, 7)


def test_initialization_after_the_meta_device_is_complete():
    with torch.device("meta"):
        model = InternImage(**CLIP, num_classes=2, res_post_norm=True, center_feature_scale=True)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_layer_decay_groups_the_further_norms_with_blocks_and_the_head_with_the_last_block():
    model = InternImage(**CLIP, level2_post_norm=True, level2_post_norm_block_ids=[0, 1])
    groups = group_parameters(model, model.group_matcher())
    group_of = {name: group for group, names in groups.items() for name in names}
    assert len(groups) == 5
    for name, block in (
        ("levels.2.post_norms.0.0.weight", "levels.2.blocks.0.norm1.0.weight"),
        ("levels.2.post_norms.1.0.weight", "levels.2.blocks.1.norm1.0.weight"),
        ("clip_projector.cross_dcn.q_bias", "levels.3.blocks.0.norm1.0.weight"),
        ("dcnv3_head_x3.weight", "head.weight"),
    ):
        assert group_of[name] == group_of[block]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"res_post_norm": True, "post_norm": True}, "res_post_norm must be False with post_norm"),
        ({"res_post_norm": True, "layer_scale": 1.0}, "res_post_norm must be False with post_norm"),
        (
            {"level2_post_norm": True, "level2_post_norm_block_ids": [2]},
            r"level2_post_norm_block_ids must be indices .*, got \(2,\) for depths \(1, 1, 2, 1\)",
        ),
        ({"global_pool": "avg"}, "global_pool must be 'map' or '' with use_clip_projector, got"),
        ({"global_pool": ""}, r"global_pool must be set for a classifier \(1000 classes\), got ''"),
    ],
)
def test_unsupported_options_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        InternImage(**{**CLIP, **options})
