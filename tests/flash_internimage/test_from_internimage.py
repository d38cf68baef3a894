"""Tests of the initialization of FlashInternImage from InternImage."""

import logging

import pytest
import torch
from torch import nn

from flash_internimage import FlashInternImage, InternImage
from flash_internimage.checkpoints import load_internimage
from ops_dcnv4 import DCNv3, DCNv4, dcnv3, dcnv4

SMALL = {"channels": 16, "depths": (1, 1, 2, 1), "groups": (1, 2, 4, 8), "num_classes": 5}
POST = {"post_norm": True, "layer_scale": 0.5}

pytestmark = pytest.mark.usefixtures("one_thread")


def internimage(**kwargs) -> InternImage:
    torch.manual_seed(0)
    model = InternImage(**SMALL, **kwargs)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.double()


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1.0, 0.5), (2.0, 1.0)], ids=str)
@torch.no_grad()
def test_offsets_are_equal_and_modulation_to_first_order(scales, assert_near):
    source = internimage(offset_scale=scales[0])
    for module in source.modules():
        if isinstance(module, DCNv3):  # small scores, of which the softmax is almost linear
            nn.init.normal_(module.mask.weight, std=1e-5)
            nn.init.normal_(module.mask.bias, std=1e-5)
    model = FlashInternImage(**SMALL, offset_scale=scales[1]).double()
    load_internimage(model, source.state_dict(), offset_scale=scales[0])
    ours = [module for module in model.modules() if isinstance(module, DCNv4)]
    theirs = [module for module in source.modules() if isinstance(module, DCNv3)]
    for one, other in zip(ours, theirs, strict=True):
        x, features = torch.randn(2, 2, 5, 6, one.channels).double()
        mask = other.mask(features).unflatten(-1, (other.group, 9)).softmax(-1).flatten(-2)
        expected = dcnv3(x, other.offset(features), mask, *other.window())
        assert_near(dcnv4(x, one.offset_mask(features), *one.window()), expected, 1e-6)


def test_what_was_carried_over_is_reported(caplog):
    caplog.set_level(logging.INFO)
    source = internimage(**POST)
    model = FlashInternImage(**SMALL, **POST, dw_kernel_size=3).double()
    state = source.state_dict()
    transfer = load_internimage(model, state)
    own = model.state_dict()
    assert {*transfer.copied, *transfer.converted, *transfer.kept} == {*own}
    assert transfer.kept == []
    assert {name.split(".dcn.")[-1] for name in transfer.converted} == {
        "offset_mask.weight",
        "offset_mask.bias",
    }
    parts = (".dcn.dw_conv.1.", ".dcn.output_proj.bias", ".mlp.fc2.bias")
    assert {*transfer.unused} == {name for name in state if any(part in name for part in parts)}
    for name in ("levels.0.blocks.0.gamma1", "head.weight", "patch_embed.conv1.bias"):
        assert torch.equal(own[name], state[name])
    block = "levels.2.blocks.1.dcn"
    assert torch.equal(own[f"{block}.value_proj.weight"], state[f"{block}.input_proj.weight"])
    assert torch.equal(own[f"{block}.offset_mask_dw.bias"], state[f"{block}.dw_conv.0.bias"])
    count = f"{len(transfer.copied)} tensors copied, 10 converted, 0 kept as they were; "
    assert count + f"{len(transfer.unused)} of {len(state)} in the checkpoint" in caplog.text


def test_other_shapes_are_kept():
    source = internimage()
    model = FlashInternImage(**{**SMALL, "groups": (2, 2, 4, 8), "num_classes": 3}).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    transfer = load_internimage(model, source.state_dict())
    kept = {"head.weight", "head.bias"}
    kept |= {f"levels.0.blocks.0.dcn.offset_mask.{name}" for name in ("weight", "bias")}
    assert {*transfer.kept} == kept
    for name in kept:
        assert torch.equal(model.state_dict()[name], before[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_weights_of_few_bits_are_widened(dtype):
    state = {name: tensor.to(dtype) for name, tensor in internimage().state_dict().items()}
    models = [FlashInternImage(**SMALL) for _ in range(2)]
    load_internimage(models[0], state)
    load_internimage(models[1], {name: tensor.float() for name, tensor in state.items()})
    expected = models[1].state_dict()
    for name, tensor in models[0].state_dict().items():
        assert tensor.dtype == expected[name].dtype
        assert tensor.equal(expected[name]), name


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda s: {"a": s["head.bias"]}, {}, "state_dict must contain the weights of an InternIm"),
        (lambda s: s | {"head.bias": s["head.bias"] / 0}, {}, "weights must be finite, got NaN or"),
        (lambda s: s | {"head.bias": s["head.bias"].long()}, {},
         r"weights must be floating-point, got torch\.int64 in head\.bias"),
        (lambda s: s, {"offset_scale": 0}, "offset_scale must be positive, got 0"),
    ],
)  # fmt: skip
def test_unusable_arguments_are_rejected(change, options, message):
    model, state = FlashInternImage(**SMALL), internimage().state_dict()
    with pytest.raises(ValueError, match=message):
        load_internimage(model, change(state), **options)
