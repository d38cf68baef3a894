"""Tests of the replacement of layers of other models by DCNv4."""

import logging

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from flash_internimage.dropin import DepthwiseDCNv4, TokenDCNv4, replace
from ops_dcnv4 import DCNv4, DCNv4Conv2d

CONVNEXT = {"depths": (1, 1, 2, 1), "dims": (16, 24, 40, 64), "num_classes": 5}
VIT = {"img_size": (32, 48), "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}

pytestmark = pytest.mark.usefixtures("one_thread")


def convnext(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("convnext_atto", **{**CONVNEXT, **kwargs})


def vit(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **{**VIT, **kwargs})


def kinds(model: nn.Module, kind: type) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


def assert_trains(model: nn.Module, *shape: int) -> None:
    F.cross_entropy(model.train()(torch.randn(shape)), torch.tensor([0, 1])).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.get_parameter(next(iter(dict(model.named_parameters())))).grad.abs().sum() > 0


def test_depth_wise_convolutions_of_convnext_are_replaced(caplog):
    caplog.set_level(logging.INFO)
    model = replace(convnext())
    names = kinds(model, DepthwiseDCNv4)
    assert names == [
        f"stages.{i}.blocks.{j}.conv_dw" for i, j in ((0, 0), (1, 0), (2, 0), (2, 1), (3, 0))
    ]
    assert "replaced 5 layers by DCNv4" in caplog.text
    assert ", ".join(names) in caplog.text
    assert [model.get_submodule(name).dcn.group for name in names] == [1, 3, 5, 5, 4]
    assert_trains(model, 2, 3, 64, 96)


def test_a_fresh_layer_averages_over_its_window(assert_near):
    model = replace(convnext().double())
    layer, x = model.stages[0].blocks[0].conv_dw, torch.randn(2, 16, 7, 9).double()
    assert_near(layer(x), F.avg_pool2d(x, 3, stride=1, padding=1), 1e-7)


def test_attention_of_a_vision_transformer_is_replaced_without_class_token(assert_near):
    model = vit(dynamic_img_size=True)
    position = model.pos_embed.detach().clone()
    replace(model)
    assert kinds(model, TokenDCNv4) == ["blocks.0.attn", "blocks.1.attn"]
    assert "cls_token" not in dict(model.named_parameters())
    assert torch.equal(model.pos_embed, position[:, 1:])
    x = torch.randn(2, 3, 32, 48)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 6, 32)
    assert_near(model.forward_head(tokens, pre_logits=True), tokens.mean(1), 1e-6)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)
    with pytest.raises(ValueError, match="the length is not a square"):
        model(torch.randn(1, 3, 32, 80))
    assert_trains(model, 2, 3, 32, 48)


def test_tokens_are_sampled_row_by_row(assert_near):
    layer = TokenDCNv4(8, (2, 3), group=1, without_pointwise=True, initial_modulation=1 / 9)
    x = torch.randn(1, 6, 8)
    image = x.transpose(1, 2).unflatten(2, (2, 3))
    expected = F.avg_pool2d(image, 3, stride=1, padding=1).flatten(2).transpose(1, 2)
    assert_near(layer(x), expected, 1e-6)


@pytest.mark.parametrize(
    "which",
    ["stem.0", ["stem.0"], lambda name, module: isinstance(module, nn.Conv2d) and "stem" in name],
)
def test_layers_are_chosen_by_name_or_predicate(which):
    model = convnext()
    convolution = model.stem[0]
    replace(model, which)
    assert kinds(model, (DCNv4, DCNv4Conv2d)) == ["stem.0"]
    replaced = model.stem[0]
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"):
        assert getattr(replaced, name) == getattr(convolution, name)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 7, "padding": 3},
        {"kernel_size": 7, "padding": "same"},
        {"kernel_size": 5, "stride": 2, "padding": 2},
        {"kernel_size": (5, 3), "padding": "valid"},
        {"kernel_size": 3, "dilation": 2, "padding": 1},
    ],
    ids=str,
)
def test_depth_wise_convolutions_keep_the_size_of_their_output(options):
    model = nn.Sequential(nn.Conv2d(8, 8, groups=8, **options))
    x = torch.randn(2, 8, 11, 13)
    shape = model(x).shape
    assert replace(model, "0", group_channels=4)(x).shape == shape


def test_device_dtype_and_options_are_passed_to_the_layers():
    model = convnext(device="meta", dtype=torch.bfloat16)
    replace(model, kernel_size=5, dw_kernel_size=3, offset_scale=2.0, group_channels=8)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    dcn = model.stages[0].blocks[0].conv_dw.dcn
    options = (dcn.kernel_size, dcn.pad, dcn.dw_kernel_size, dcn.offset_scale, dcn.group)
    assert options == ((5, 5), (2, 2), 3, 2.0, 2)


@pytest.mark.slow
def test_models_with_replaced_layers_are_exported():
    for model, shape in ((convnext(), (2, 3, 64, 64)), (vit(), (2, 3, 32, 48))):
        replace(model.eval())
        x = torch.randn(shape)
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), model(x))


def test_models_of_the_paper_are_registered():
    sizes = {"convnext_base_dcnv4": 36, "vit_base_dcnv4": 12}
    for name, layers in sizes.items():
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=3)
        assert len(kinds(model, DCNv4)) == layers
        assert model(torch.zeros(1, 3, 224, 224, device="meta")).shape == (1, 3)
        with pytest.raises(ValueError, match=f"pretrained must be False: {name} has no released"):
            timm.create_model(name, pretrained=True)


@pytest.mark.parametrize(
    ("which", "options", "message"),
    [
        ("stem.9", {}, "which must be names of layers of ConvNeXt, got 'stem.9'"),
        ([], {}, "which must be names of layers of ConvNeXt, got none"),
        ("head", {}, "which must select timm's Attention, or .*, got head"),
        (lambda name, module: False, {}, "which must select layers of ConvNeXt, got none"),
        ("stem.0", {"kernel_size": 5}, "kernel_size must not be given with ungrouped convolutions"),
        (None, {"group_channels": 0}, "group_channels must be a positive integer, got 0"),
    ],
)
def test_errors_leave_the_model_as_it_was(which, options, message):
    model = convnext()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        replace(model, which, **options)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_models_without_such_layers_require_a_choice():
    with pytest.raises(ValueError, match="which must be given for a model without a ConvNeXt"):
        replace(nn.Sequential(nn.Conv2d(4, 4, 3)))
