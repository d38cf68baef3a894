"""Tests of the names of layers, and of running a backbone up to one."""

import copy

import pytest
import torch
from torch import nn

from flash_internimage import InternImage
from flash_internimage.sampling import last_of_stages, list_layers, sampling_points
from flash_internimage.sampling.layers import find_layer, predict_offset_masks
from ops_dcnv4 import dcnv4
from tests.flash_internimage.models import assert_equal

NAMES = [f"levels.{name}" for name in
         ("0.blocks.0", "1.blocks.0", "2.blocks.0", "2.blocks.1", "3.blocks.0")]  # fmt: skip


class Detector(nn.Module):
    def __init__(self, **backbones: nn.Module):
        super().__init__()
        for name, backbone in backbones.items():
            self.add_module(name, backbone)
        self.neck = nn.Conv2d(8, 8, 1)


def test_layers_are_listed_in_order(model):
    assert list_layers(model) == NAMES
    assert list_layers(Detector(backbone=model)) == [f"backbone.{name}" for name in NAMES]


def test_layers_are_found_with_and_without_prefix(model):
    detector = Detector(backbone=model)
    for name in ("backbone.levels.2.blocks.1", "levels.2.blocks.1", "levels.2.blocks.1.dcn"):
        layer = find_layer(detector, name)
        assert layer.dcn is model.levels[2].blocks[1].dcn
        assert (layer.name, layer.stride) == ("backbone.levels.2.blocks.1", 16)


def test_the_layer_below_may_be_in_the_stage_before(model):
    layer = find_layer(Detector(backbone=model), "levels.2.blocks.1")
    names = []
    while layer is not None:
        names.append(layer.name)
        layer = layer.below()
    assert names == [f"backbone.{name}" for name in reversed(NAMES[:4])]


def test_the_last_layers_of_stages_include_a_further_one(model):
    ends = [name for name in NAMES if name != "levels.2.blocks.0"]
    assert last_of_stages(model) == ends
    assert last_of_stages(model, "levels.2.blocks.0.dcn") == NAMES


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("levels.2.block.1", "got 'levels.2.block.1'; did you mean 'levels.2.blocks.1'?"),
        ("levels.2.blocks.2", "did you mean 'levels.2.blocks.[01]'?"),
        ("levels.2", "got 'levels.2', which contains 2 layers"),
        ("neck", "got 'neck', a Conv2d without sampling points"),
        ("levels.1.downsample", "a Downsample without sampling points"),
        ("xyz", "backbone.levels.2.blocks.0 to 1 or backbone.levels.3.blocks.0, got 'xyz'$"),
        ("", "got ''$"),
    ],
)
def test_other_names_are_rejected(name, message, model):
    with pytest.raises(
        ValueError, match="layer must be backbone.levels.0.blocks.0 or .*" + message
    ):
        find_layer(Detector(backbone=model), name)


def test_a_name_in_two_backbones_is_ambiguous(model):
    twins = Detector(student=model, teacher=copy.deepcopy(model))
    with pytest.raises(ValueError, match=r"one of student\..+\.0, teacher\.levels\.0"):
        find_layer(twins, "levels.0.blocks.0")
    assert find_layer(twins, "teacher.levels.0.blocks.0").backbone is twins.teacher


def test_a_model_without_backbone_is_rejected():
    with pytest.raises(ValueError, match="FlashInternImage or InternImage, got Conv2d"):
        list_layers(nn.Conv2d(3, 3, 1))


def test_a_model_remains_as_it_was(model, image):
    model.train()
    model.levels[1].eval()
    model.set_grad_checkpointing()
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    sampling_points(model, image, "levels.2.blocks.1", (1, 1))
    assert [module.training for module in model.modules()] == modes
    assert all(stage.grad_checkpointing for stage in model.levels)
    assert_equal(model.state_dict(), state)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_predicted_points_of_internimage_reproduce_the_output_of_its_layers():
    torch.manual_seed(0)
    model = InternImage(channels=16, depths=(1, 1, 2, 1), groups=(1, 2, 4, 8), num_classes=0)
    for name, parameter in model.named_parameters():
        if ".offset." in name or ".mask." in name:
            nn.init.normal_(parameter)
    layers = [find_layer(model.double(), name) for name in ("levels.0.blocks.0", NAMES[3])]
    calls = {}
    for layer in layers:
        layer.dcn.register_forward_hook(
            lambda dcn, inputs, output: calls.update({dcn: (inputs, output)})
        )
    masks = predict_offset_masks(layers, torch.randn(1, 3, 64, 96, dtype=torch.float64))
    assert len(calls) == len(layers)
    for layer, mask in zip(layers, masks, strict=True):
        dcn, ([x], output) = layer.dcn, calls[layer.dcn]
        expected = dcn.output_proj(dcnv4(dcn.input_proj(x), mask, *layer.window()))
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
