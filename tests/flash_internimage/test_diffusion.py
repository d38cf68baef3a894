"""Tests of the replacement of layers of diffusers' U-Nets by DCNv4."""

import copy
import importlib
import logging
import sys

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from flash_internimage import diffusion
from flash_internimage.diffusion import AttentionDCNv4, replace_in_unet
from ops_dcnv4 import DCNv4Conv2d

SMALL = {
    "in_channels": 2,
    "out_channels": 2,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "norm_num_groups": 4,
}
# The U-Net of Stable Diffusion 1.
LATENT = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}

pytestmark = pytest.mark.usefixtures("one_thread")


def unet(**kwargs) -> UNet2DModel:
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**{**SMALL, **blocks, **kwargs})


def conditional(**kwargs) -> UNet2DConditionModel:
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 8,
        "attention_head_dim": 4,
    }
    return UNet2DConditionModel(**{**SMALL, **blocks, **kwargs})


def apply(model: nn.Module, *size: int) -> torch.Tensor:
    x = torch.randn(2, 2, *size)
    text = (torch.randn(2, 3, 8),) if isinstance(model, UNet2DConditionModel) else ()
    return model(x, torch.tensor([3, 900]), *text).sample


def names_of(model: nn.Module, kind: type) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


def assert_trains(model: nn.Module) -> None:
    output = apply(model.train(), 8, 12)
    assert output.shape == (2, 2, 8, 12)
    output.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("make", [unet, conditional])
def test_convolutions_of_resnet_blocks_are_replaced(make, caplog):
    caplog.set_level(logging.INFO)
    model = make()
    blocks = [name for name in names_of(model, nn.Conv2d) if name.endswith((".conv1", ".conv2"))]
    assert replace_in_unet(model) is model
    names = names_of(model, DCNv4Conv2d)
    assert names == blocks
    assert len(names) == 16
    assert ", ".join(names) in caplog.text
    assert model.mid_block.resnets[0].conv1.offset_groups == 1
    assert_trains(model)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (
            unet,
            ["down_blocks.1.attentions.0", "up_blocks.0.attentions.0", "up_blocks.0.attentions.1",
             "mid_block.attentions.0"],
        ),
        (
            conditional,
            [f"{block}.transformer_blocks.0.attn1" for block in (
                "down_blocks.0.attentions.0", "up_blocks.1.attentions.0",
                "up_blocks.1.attentions.1", "mid_block.attentions.0")],
        ),
    ],
)  # fmt: skip
def test_self_attention_is_replaced(make, names, caplog):
    caplog.set_level(logging.INFO)
    model = replace_in_unet(make(), "attentions", kernel_size=5, group_channels=8)
    assert names_of(model, AttentionDCNv4) == names
    assert "replaced 4 layers by DCNv4" in caplog.text
    dcn = model.get_submodule(names[-1]).dcn
    assert (dcn.kernel_size, dcn.pad, dcn.group) == ((5, 5), (2, 2), 4)
    assert_trains(model)


def test_the_other_parts_of_an_attention_block_are_kept(assert_near):
    model = unet(mid_block_scale_factor=2.0).double()
    before = model.mid_block.attentions[0].eval()
    x = torch.randn(2, 32, 4, 6).double()
    replace_in_unet(model, "attentions")
    after = model.mid_block.attentions[0]
    # With these projections, attention is the mean over all pixels if query and key are zero, and
    # DCNv4 that over its window.
    identity = torch.eye(32).double()
    for linear in (before.to_v, before.to_out[0], after.dcn.value_proj, after.dcn.output_proj):
        nn.init.zeros_(linear.bias)
        with torch.no_grad():
            linear.weight.copy_(identity)
    for linear in (before.to_q, before.to_k):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    values = before.group_norm(x)
    assert_near(before(x), (values.mean((2, 3), keepdim=True) + x) / 2, 1e-9)
    # The initial weight of 1/9 is rounded to float32.
    assert_near(after(x), (F.avg_pool2d(values, 3, stride=1, padding=1) + x) / 2, 1e-7)


def test_images_of_a_transformer_need_not_be_square(assert_near):
    """A grid of 4 x 16 tokens must not be taken for 8 x 8."""
    model = copy.deepcopy(replace_in_unet(conditional().double(), "attentions")).eval()
    seen = []
    attention = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    attention.register_forward_hook(lambda _, args, output: seen.extend([args[0], output]))
    model(torch.randn(1, 2, 4, 16).double(), 1, torch.randn(1, 3, 8).double())
    tokens, output = seen
    value = attention.dcn.value_proj(tokens).transpose(1, 2).unflatten(2, (4, 16))
    mean = F.avg_pool2d(value, 3, stride=1, padding=1).flatten(2).transpose(1, 2)
    assert_near(output, attention.dcn.output_proj(mean), 1e-6)


@pytest.mark.slow
def test_unets_with_replaced_attention_are_exported():
    model = replace_in_unet(conditional(), "attentions").eval()
    inputs = torch.randn(1, 2, 4, 16), torch.tensor([5]), torch.randn(1, 3, 8)
    program = torch.export.export(model, inputs)
    torch.testing.assert_close(program.module()(*inputs).sample, model(*inputs).sample)


def test_cross_attention_remains():
    model = replace_in_unet(conditional(), "attentions").eval()
    x, text = torch.randn(1, 2, 8, 8), torch.randn(2, 1, 3, 8)
    with torch.no_grad():
        outputs = [model(x, 5, prompt).sample for prompt in text]
    assert not torch.allclose(*outputs)


def test_tokens_outside_of_a_transformer_and_cross_attention_are_rejected():
    layer = replace_in_unet(unet(), "attentions").mid_block.attentions[0]
    tokens = torch.randn(1, 16, 32)
    with pytest.raises(ValueError, match=r"hidden_states must be .* outside of a Transformer2D"):
        layer(tokens)
    with pytest.raises(ValueError, match="encoder_hidden_states and attention_mask must be None"):
        layer(torch.randn(1, 32, 4, 4), tokens)


@pytest.mark.parametrize(
    ("layers", "group_channels", "millions"),
    [
        ([], 32, 859.5),
        (["resnets"], 16, 629.7),
        (["resnets"], 32, 565.6),  # published: 566 M
        (["attentions"], 32, 845.2),
        (["resnets", "attentions"], 32, 551.3),
    ],
)
def test_parameters_of_the_latent_diffusion_size(layers, group_channels, millions):
    with torch.device("meta"):
        model = UNet2DConditionModel(**LATENT)
    for kind in layers:
        replace_in_unet(model, kind, group_channels=group_channels)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 1) == millions
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ("convolutions", {}, "layers must be 'resnets' or 'attentions', got 'convolutions'"),
        ("resnets", {"group_channels": 0}, "group_channels must be a positive integer, got 0"),
        ("attentions", {"group_channels": 0}, "group_channels must be a positive integer, got 0"),
        ("attentions", {"group": 5}, "group"),
        ("resnets", {"kernel_size": 5}, "kernel_size must not be given with ungrouped convol"),
    ],
)
def test_errors_leave_the_unet_as_it_was(layers, options, message):
    model = unet()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        replace_in_unet(model, layers, **options)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_models_without_such_layers_are_rejected():
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    model = unet(**blocks, add_attention=False)
    with pytest.raises(ValueError, match="layers must be in the U-Net, got 'attentions'"):
        replace_in_unet(model, "attentions")
    replace_in_unet(model)
    with pytest.raises(ValueError, match="layers must be in the U-Net, got 'resnets'"):
        replace_in_unet(model)
    with pytest.raises(TypeError, match=r"unet must be a UNet2DModel or .*, got Linear"):
        replace_in_unet(nn.Linear(2, 2))


def test_without_diffusers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, diffusion.__name__)
    message = r"requires diffusers: pip install 'flash-internimage\[diffusion\]'"
    with pytest.raises(ModuleNotFoundError, match=message):
        importlib.import_module(diffusion.__name__)
