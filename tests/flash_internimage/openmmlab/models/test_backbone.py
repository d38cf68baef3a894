"""Test FlashInternImage and InternImage as built and initialized by OpenMMLab."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from mmcv.ops import RoIAlign
from mmdet.models.necks import FPN
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.registry import MODELS, WEIGHT_INITIALIZERS
from mmseg.registry import MODELS as MMSEG_MODELS
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from flash_internimage import InternImage
from flash_internimage.openmmlab import (
    CompileBackboneHook,
    FlashInternImageBackbone,
    InternImageBackbone,
)
from ops_dcnv4 import DCNv4

SCHEMAS = Path(__file__).parents[3] / "data" / "schemas"
ARCHITECTURES = {"T": "tiny", "S": "small", "B": "base", "L": "large"}
SMALL = {"channels": 16, "depths": (1, 1, 2, 1), "groups": (1, 2, 4, 8)}


pytestmark = pytest.mark.usefixtures("one_thread")


def sampling(model: nn.Module) -> nn.Module:
    """Give DCNv4 nonzero offsets and masks, and the layer scales distinct values."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "gamma" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    for module in model.modules():
        if isinstance(module, DCNv4):
            nn.init.normal_(module.offset_mask.weight, std=0.1)
            nn.init.normal_(module.offset_mask.bias, std=0.5)
    return model


def backbone(seed: int = 0, **kwargs) -> FlashInternImageBackbone:
    torch.manual_seed(seed)
    return sampling(FlashInternImageBackbone(**SMALL | kwargs))


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss = sum(feature_map.square().sum() for feature_map in model(x))
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


# --- Names and feature maps ---------------------------------------------------------------------


@pytest.mark.parametrize("registry", [MODELS, MMDET_MODELS, MMSEG_MODELS])
def test_it_is_registered_in_every_project(registry):
    model = registry.build({"type": "FlashInternImage", **SMALL})
    assert type(model) is FlashInternImageBackbone


@pytest.mark.parametrize("size", ARCHITECTURES)
def test_parameters_have_the_published_names_shapes_and_counts(size):
    schema = json.loads((SCHEMAS / f"dense_{size}.json").read_text())
    with torch.device("meta"):
        model = FlashInternImageBackbone(ARCHITECTURES[size])
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert list(shapes.items()) == list(schema["state_dict"].items())
    assert [name for name, _ in model.named_parameters()] == schema["parameter_names"]
    assert sum(parameter.numel() for parameter in model.parameters()) == schema["num_params"]


def test_arguments_override_the_architecture():
    with torch.device("meta"):
        model = FlashInternImageBackbone("large", depths=(1, 1, 1, 1), dcn_output_bias=False)
    assert [len(level.blocks) for level in model.levels] == [1, 1, 1, 1]
    assert model.levels[0].blocks[0].dcn.output_proj.bias is None
    assert model.levels[0].blocks[0].mlp.fc2.bias is not None


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 2, 3), (0, 2), (1,)])
@torch.no_grad()
def test_feature_maps_equal_those_of_timm(out_indices):
    model = sampling(FlashInternImageBackbone("nano", out_indices=out_indices)).eval()
    reference = timm.create_model(
        "flash_internimage_nano", features_only=True, out_indices=out_indices, layer_scale=1.0
    ).eval()
    reference.model.load_state_dict(model.state_dict(), strict=True)
    x = images(2, 3, 96, 70)
    maps, expected = model(x), reference(x)
    assert isinstance(maps, tuple)
    assert [m.shape[1] for m in maps] == [32 * 2**i for i in out_indices]
    for actual, other in zip(maps, expected, strict=True):
        torch.testing.assert_close(actual, other, rtol=0, atol=0)


def test_layers_after_the_last_feature_map_are_left_out():
    names = {name for name, _ in backbone(out_indices=(0, 1)).named_parameters()}
    assert {name.split(".")[1] for name in names if name.startswith("levels")} == {"0", "1"}
    assert not any(name.startswith(("levels.1.downsample", "conv_head", "head")) for name in names)
    assert gradients(backbone(out_indices=(0, 1)), images(1, 3, 64, 64)).keys() == names


@torch.no_grad()
def test_roi_align_accepts_the_memory_format_of_the_feature_maps():
    maps = backbone().eval()(images(1, 3, 64, 64))
    pyramid = FPN([16, 32, 64, 128], 8, 4)(maps)
    roi_align, rois = RoIAlign(7, 0.25), torch.tensor([[0.0, 5.0, 9.0, 50.0, 40.0]])
    for level in (maps[0], pyramid[0]):
        expected = roi_align(level.clone(memory_format=torch.contiguous_format), rois)
        assert roi_align(level, rois).equal(expected)


# --- Training -----------------------------------------------------------------------------------


def test_recomputing_gives_the_same_gradients():
    plain = backbone(drop_path_rate=0.5).train()
    recomputing = FlashInternImageBackbone(**SMALL, drop_path_rate=0.5, with_cp=True).train()
    recomputing.load_state_dict(plain.state_dict())
    calls = []
    for level in recomputing.levels:
        level.blocks[0].register_forward_pre_hook(lambda *_: calls.append(None))
    results = []
    for model in (plain, recomputing):
        torch.manual_seed(3)
        results.append(gradients(model, images(4, 3, 64, 64)))
    assert len(calls) == 8
    assert all(results[1][name].equal(grad) for name, grad in results[0].items())
    assert results[0].keys() == dict(plain.named_parameters()).keys()


@pytest.mark.parametrize(
    ("frozen_stages", "frozen"),
    [
        (-1, ()),
        (0, ("patch_embed.",)),
        (2, ("patch_embed.", "levels.0.", "levels.1.")),
        (4, ("patch_embed.", "levels.")),
    ],
)
def test_only_frozen_stages_have_no_gradients(frozen_stages, frozen):
    model = backbone(frozen_stages=frozen_stages)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(frozen), name
    if frozen_stages < 4:
        assert all(grad.any() for grad in gradients(model, images(2, 3, 64, 64)).values())


def test_frozen_stages_have_no_stochastic_depth():
    model = backbone(frozen_stages=3, drop_path_rate=0.9)
    for _ in range(2):
        assert model.train() is model
        x = images(4, 3, 64, 64)
        trained, evaluated = model(x), copy.deepcopy(model).eval()(x)
        same = [a.equal(b) for a, b in zip(trained, evaluated, strict=True)]
        assert same == [True, True, True, False]
        model.eval()


# --- Pretrained weights -------------------------------------------------------------------------


def pretrained(
    source: object, seed: int = 1, init_cfg: dict | None = None, **kwargs
) -> FlashInternImageBackbone:
    init_cfg = {"type": "Pretrained", "checkpoint": str(source), **(init_cfg or {})}
    model = backbone(seed, init_cfg=init_cfg, **kwargs)
    model.init_weights()
    return model


def assert_weights(model: nn.Module, expected: dict[str, Tensor]) -> None:
    weights = model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(weights[name].equal(expected[name]) for name in expected)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return backbone().state_dict()


@pytest.fixture(scope="module")
def classifier() -> dict[str, Tensor]:
    """Return weights of an image classifier with layer scales, under the published names."""
    torch.manual_seed(5)
    arguments = {**SMALL, "layer_scale": 1.0, "num_classes": 7}
    return sampling(timm.create_model("flash_internimage_nano", **arguments)).state_dict()


def test_initial_weights_are_kept_without_a_checkpoint():
    model = backbone()
    before = copy.deepcopy(model.state_dict())
    model.init_weights()
    assert_weights(model, before)


@pytest.mark.parametrize("container", ["state_dict", "model_ema", "model"])
def test_published_checkpoints_of_a_classifier(container, classifier, tmp_path):
    torch.save({container: classifier, "epoch": 299}, tmp_path / "classifier.pth")
    model = pretrained(tmp_path / "classifier.pth")
    assert_weights(model, {name: classifier[name] for name in model.state_dict()})


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
def test_prefixes(prefix, weights, tmp_path):
    prefixed = {prefix + name: tensor for name, tensor in weights.items()}
    torch.save({"state_dict": prefixed}, tmp_path / "backbone.pth")
    assert_weights(pretrained(tmp_path / "backbone.pth"), weights)


def test_only_the_backbone_of_a_detector_is_loaded(weights, tmp_path):
    names = {"neck.convs.0.weight": torch.zeros(1), "ema_backbone_norm": torch.zeros(1)}
    names |= {"backbone." + name: tensor for name, tensor in weights.items()}
    checkpoint = {
        "state_dict": names,
        "meta": {"epoch": 1},
        "message_hub": {"best": np.float64(0.5)},
    }
    path = tmp_path / "detector.pth"
    torch.save(checkpoint, path)
    assert_weights(pretrained(path), weights)
    assert_weights(pretrained(path, init_cfg={"prefix": None}), weights)


@pytest.mark.parametrize("prefix", ["backbone.", "backbone", "teacher.backbone.", "student"])
def test_prefix_selects_the_same_weights_as_in_mmengine(prefix, tmp_path):
    parts = {
        name: backbone(seed).state_dict()
        for seed, name in enumerate(("backbone.", "teacher.backbone.", "student."), start=2)
    }
    names = {part + name: tensor for part in parts for name, tensor in parts[part].items()}
    path = tmp_path / "detector.pth"
    torch.save({"state_dict": names, "meta": {}}, path)
    expected = parts[prefix.removesuffix(".") + "."]
    own = pretrained(path, init_cfg={"prefix": prefix, "map_location": "cpu"})
    assert_weights(own, expected)
    theirs = backbone(1)
    init_cfg = {"type": "Pretrained", "checkpoint": str(path), "prefix": prefix}
    WEIGHT_INITIALIZERS.build(init_cfg)(theirs)
    assert_weights(theirs, expected)


def test_prefix_missing_from_the_checkpoint_is_an_error(weights, tmp_path):
    torch.save(weights, tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match=r"prefix must match names .*levels.*, got 'backbone\.'"):
        pretrained(tmp_path / "backbone.pth", init_cfg={"prefix": "backbone."})


def test_init_cfg_accepts_the_class_of_mmengine(weights, tmp_path):
    torch.save(weights, tmp_path / "backbone.pth")
    kind = WEIGHT_INITIALIZERS.get("Pretrained")
    assert_weights(pretrained(tmp_path / "backbone.pth", init_cfg={"type": kind}), weights)


def test_safetensors(weights, tmp_path):
    save_file(weights, tmp_path / "model.safetensors")
    assert_weights(pretrained(tmp_path / "model.safetensors"), weights)


def test_fewer_stages_than_the_checkpoint(classifier, tmp_path):
    torch.save({"model": classifier}, tmp_path / "classifier.pth")
    model = pretrained(tmp_path / "classifier.pth", out_indices=(0, 2))
    assert_weights(model, {name: classifier[name] for name in model.state_dict()})


@pytest.mark.parametrize("post_norm", [False, True])
@torch.no_grad()
def test_checkpoint_without_layer_scales(post_norm, tmp_path):
    source = backbone(layer_scale=None, post_norm=post_norm).eval()
    torch.save({"model": source.state_dict()}, tmp_path / "tiny.pth")
    torch.manual_seed(1)
    init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "tiny.pth")}
    model = FlashInternImageBackbone(**SMALL, post_norm=post_norm, init_cfg=init_cfg).eval()
    model.init_weights()
    x = images(1, 3, 64, 64)
    assert all(a.equal(b) for a, b in zip(model(x), source(x), strict=True))
    assert all(p.eq(1).all() for name, p in model.named_parameters() if "gamma" in name)


def test_layer_scales_other_than_one_must_be_in_the_checkpoint(tmp_path):
    torch.save(backbone(layer_scale=None).state_dict(), tmp_path / "tiny.pth")
    with pytest.raises(ValueError, match=r"missing: levels\.0\.blocks\.0\.gamma1"):
        pretrained(tmp_path / "tiny.pth", layer_scale=1e-5)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda w: w.pop("levels.2.blocks.1.norm1.0.bias"),
            r"missing: levels\.2\.blocks\.1\.norm",
        ),
        (lambda w: w.update(neck=torch.zeros(1)), "unexpected: neck"),
        (
            lambda w: w.update({"patch_embed.conv1.bias": torch.zeros(2)}),
            r"shape of patch_embed\.conv1\.bias: \(2,\), expected \(8,\)",
        ),
        (lambda w: w.pop("levels.0.blocks.0.gamma2"), r"missing: levels\.0\.blocks\.0\.gamma2"),
    ],
    ids=["missing", "unexpected", "shape", "one scale"],
)
def test_weights_that_do_not_fit_leave_the_model_unchanged(change, problem, weights, tmp_path):
    changed = dict(weights)
    change(changed)
    torch.save(changed, tmp_path / "changed.pth")
    init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "changed.pth")}
    model = backbone(1, init_cfg=init_cfg)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=problem):
        model.init_weights()
    assert_weights(model, before)


def test_models_without_released_weights_are_rejected():
    with pytest.raises(FileNotFoundError, match=r"nano\.untrained is neither .*tiny\.in1k"):
        pretrained("flash_internimage_nano.untrained")


def test_weights_are_loaded_once(weights, tmp_path):
    torch.save(weights, tmp_path / "backbone.pth")
    model = pretrained(tmp_path / "backbone.pth")
    model.patch_embed.conv1.bias.data.zero_()
    model.init_weights()
    assert not model.patch_embed.conv1.bias.any()


def test_detector_initializes_its_backbone(weights, tmp_path):
    torch.save({"model": weights}, tmp_path / "backbone.pth")
    init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "backbone.pth")}
    config = {
        "type": "RetinaNet",
        "backbone": {"type": "FlashInternImage", **SMALL, "init_cfg": init_cfg},
        "neck": {"type": "LayerNormFPN", "in_channels": [16, 32, 64, 128], "out_channels": 8}
        | {"num_outs": 5},
        "bbox_head": {
            "type": "RetinaHead",
            "num_classes": 2,
            "in_channels": 8,
            "feat_channels": 8,
            "anchor_generator": {
                "type": "AnchorGenerator",
                "scales": [8],
                "ratios": [1.0],
                "strides": [4, 8, 16, 32, 64],
            },
        },
    }
    detector = MMDET_MODELS.build(config)
    detector.init_weights()
    assert_weights(detector.backbone, weights)


# --- torch.compile ------------------------------------------------------------------------------


@pytest.mark.slow
def test_images_of_any_size_share_the_graph_of_the_compile_hook():
    eager = backbone(depths=(1,), groups=(1,), out_indices=(0,))
    runner = SimpleNamespace(model=nn.Module())
    runner.model.backbone = compiled = copy.deepcopy(eager)
    counter = CompileCounter()
    torch._dynamo.reset()
    CompileBackboneHook(backend=counter, fullgraph=True).before_run(runner)
    for size in ((2, 3, 64, 96), (3, 3, 96, 80), (2, 3, 70, 90)):
        actual, expected = (gradients(model, images(*size)) for model in (compiled, eager))
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name])
        assert counter.frame_count == 1


# --- Errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"arch": "huge"}, "arch must be one of nano, tiny, small, base, large, got 'huge'"),
        ({"out_indices": ()}, r"out_indices must be ascending stages from 0 to 3, got \(\)"),
        ({"out_indices": (1, 0)}, r"out_indices must be .*, got \(1, 0\)"),
        ({"out_indices": (2, 2)}, r"out_indices must be .*, got \(2, 2\)"),
        ({"out_indices": [3, 4]}, r"out_indices must be .*, got \[3, 4\]"),
        ({"out_indices": (-1,)}, r"out_indices must be .*, got \(-1,\)"),
        ({"frozen_stages": 5}, "frozen_stages must be an integer from -1 to 4, got 5"),
        ({"frozen_stages": -2}, "frozen_stages must be an integer from -1 to 4, got -2"),
        ({"groups": (1, 2)}, "groups must have one entry per stage"),
        ({"init_cfg": {"type": "Xavier"}}, r"init_cfg must be dict\(type='Pretrained', check"),
        ({"init_cfg": {"type": "Pretrained"}}, r"init_cfg must be dict\(.*got {'type'"),
        ({"init_cfg": {"checkpoint": "a.pth"}}, r"init_cfg must be dict\("),
        ({"init_cfg": [{"type": "Constant"}]}, r"init_cfg must be dict\("),
        (
            {"init_cfg": {"type": "Pretrained", "checkpoint": "a.pth", "prefiks": "x."}},
            r"init_cfg must be dict\(.*, got the unknown key 'prefiks'",
        ),
        (
            {"init_cfg": {"type": "Pretrained", "checkpoint": "a.pth", "prefix": 3}},
            "init_cfg's prefix must be a string, got 3",
        ),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        FlashInternImageBackbone(**SMALL | arguments)


# InternImage


@pytest.mark.parametrize("arch", ["tiny", "huge"])
def test_internimage_is_a_backbone_with_the_layer_scale_of_published_detectors(arch):
    with torch.device("meta"):
        model = MODELS.build({"type": "InternImage", "arch": arch, "out_indices": (1, 2, 3)})
    assert type(model) is InternImageBackbone
    names = [*model.state_dict()]
    assert any("gamma" in name for name in names) == (arch == "tiny")
    assert not any(name.startswith(("head", "conv_head", "dcnv3", "clip", "fc")) for name in names)
    maps = model(torch.zeros(1, 3, 64, 96, device="meta"))
    channels = model.levels[0].blocks[0].dcn.channels
    assert [tuple(m.shape[1:]) for m in maps] == [
        (channels * 2**i, 16 // 2**i, 24 // 2**i) for i in (1, 2, 3)
    ]


def test_internimage_loads_a_classifier_and_keeps_its_own_layer_scale(tmp_path):
    torch.manual_seed(0)
    options = {"channels": 16, "depths": (1, 1, 2, 1), "groups": (1, 2, 4, 8)}
    classifier = InternImage(**options, num_classes=5).eval()
    torch.save({"model": classifier.state_dict()}, tmp_path / "classifier.pth")
    init_cfg = {"type": "Pretrained", "checkpoint": str(tmp_path / "classifier.pth")}
    model = InternImageBackbone(**options, init_cfg=init_cfg).eval()
    model.init_weights()
    x = torch.randn(1, 3, 64, 64)
    for one, other in zip(model(x), classifier.forward_intermediates(x)[1], strict=True):
        torch.testing.assert_close(one, other)


def test_internimage_with_norms_after_its_branches_has_no_layer_scale_by_default():
    model = InternImageBackbone(**SMALL, res_post_norm=True)
    assert not any("gamma" in name for name in model.state_dict())
