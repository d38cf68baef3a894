"""Tests of the interfaces of timm, torchvision and torch, modeled on timm's own tests."""

import math

import numpy as np
import pytest
import timm
import torch
from timm.layers import create_feature_extractor
from timm.models import FeatureInfo
from torch import nn
from torchvision.models.feature_extraction import (
    create_feature_extractor as create_torchvision_extractor,
)

from flash_internimage import FlashInternImage
from tests.flash_internimage.models import SMALL, STYLES, assert_equal, images, nano

pytestmark = pytest.mark.usefixtures("one_thread")


# Feature maps


@pytest.mark.parametrize("feature_cls", ["getter", "hook", "fx"])
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 3), (-1,)])
def test_every_extractor_matches_feature_info(feature_cls, out_indices):
    model = nano(0, features_only=True, out_indices=out_indices, feature_cls=feature_cls).eval()
    x = images(1, 3, 97, 70)
    _, expected = nano(0).eval().forward_intermediates(x)
    maps = model(x)
    info = model.feature_info
    assert len(maps) == len(info.channels())
    for actual, i, channels, stride in zip(
        maps, out_indices, info.channels(), info.reduction(), strict=True
    ):
        assert actual.shape == (1, channels, math.ceil(97 / stride), math.ceil(70 / stride))
        assert actual.equal(expected[i])


@pytest.mark.parametrize("out_indices", [(3, 1), (0, 0), [], (0, 4), (-1, 3), (-1, 0)])
def test_other_orders_of_feature_maps_are_rejected(out_indices):
    with pytest.raises(ValueError, match="out_indices must be ascending stages from 0 to 3, got"):
        nano(0, features_only=True, out_indices=out_indices)


def test_the_extractor_can_be_given_in_a_dict():
    model = nano(0, features_only=True, feature_cfg={"feature_cls": "hook", "out_indices": (1,)})
    assert isinstance(model, timm.models.FeatureHookNet)
    assert [m.shape for m in model(images(1, 3, 64, 64))] == [(1, 64, 8, 8)]


@pytest.mark.parametrize("feature_cls", ["list", "dict", "other"])
def test_other_extractors_are_rejected(feature_cls):
    message = f"feature_cls must be 'getter', 'hook' or 'fx', got '{feature_cls}'"
    with pytest.raises(ValueError, match=message):
        nano(0, features_only=True, feature_cls=feature_cls)


@pytest.mark.parametrize("extract", [create_feature_extractor, create_torchvision_extractor])
@STYLES
def test_torch_fx_gives_the_same_values(extract, style):
    model = FlashInternImage(**SMALL, **style).eval()
    nodes = [info["module"] for info in model.feature_info]
    x = images(2, 3, 97, 70)
    *maps, logits = extract(model, [*nodes, "head"])(x).values()
    _, expected = model.forward_intermediates(x)
    assert all(actual.equal(e) for actual, e in zip(maps, expected, strict=True))
    assert logits.equal(model(x))


@STYLES
def test_torch_fx_trains(style):
    model = FlashInternImage(**SMALL, **style, drop_path_rate=0.1).train()
    graph = torch.fx.symbolic_trace(model)
    graph(images(2, 3, 64, 64)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    torch.manual_seed(0)
    expected = model(images(2, 3, 64, 64))
    torch.manual_seed(0)
    assert graph(images(2, 3, 64, 64)).equal(expected)


def test_forward_intermediates_returns_the_features_last():
    model, x = nano(0).eval(), images(1, 3, 96, 96)
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    output, maps = model.forward_intermediates(x, output_fmt="NCHW")
    assert [m.shape[1] for m in maps] == info.channels()
    assert output.equal(model.forward_features(x))
    model.set_grad_checkpointing()
    assert model.forward_intermediates(x)[0].equal(output)


# Deployment


@pytest.mark.parametrize("kwargs", [{}, {"scriptable": True}, {"features_only": True}])
def test_torch_jit_script_is_rejected_in_one_sentence(kwargs):
    with pytest.raises(
        NotImplementedError, match=r"^DCNv4 cannot be compiled by torch\.jit\.script: use"
    ):
        torch.jit.script(nano(0, **kwargs))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traced_model_gives_the_same_values():
    model, x = nano(0, exportable=True).eval(), images(1, 3, 64, 64)
    assert torch.jit.trace(model, x)(x).equal(model(x))


# Construction


def test_only_the_published_output_stride_is_supported():
    assert nano(0, output_stride=32)(images(1, 3, 64, 64)).shape == (1, 1000)
    assert len(nano(0, output_stride=32, features_only=True)(images(1, 3, 64, 64))) == 4
    with pytest.raises(ValueError, match="output_stride must be 32, got 16"):
        nano(0, output_stride=16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@STYLES
def test_dtype_applies_to_every_parameter(dtype, style):
    model = FlashInternImage(**SMALL, **style, dtype=dtype, device="cpu")
    assert {tensor.dtype for tensor in model.parameters()} == {dtype}
    assert model(images(1, 3, 64, 64).to(dtype)).dtype == dtype
    model.reset_classifier(3)
    assert model.head.weight.dtype == dtype


def on_meta_by_argument(**kwargs):
    return FlashInternImage(**kwargs, device="meta").to_empty(device="cpu")


def on_meta_by_context(**kwargs):
    with torch.device("meta"):
        model = FlashInternImage(**kwargs)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    return model.to_empty(device="cpu")


def without_initialization(**kwargs):
    return nn.utils.skip_init(FlashInternImage, **kwargs)


@pytest.mark.parametrize(
    "construct", [on_meta_by_argument, on_meta_by_context, without_initialization]
)
@STYLES
def test_weights_can_be_initialized_later(construct, style):
    model = construct(**SMALL, **style)
    for tensor in model.state_dict().values():
        tensor.fill_(99)
    torch.manual_seed(0)
    model.init_weights()
    expected = FlashInternImage(**SMALL, **style).state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.shape == expected[name].shape
        if tensor.numel() > 100 and expected[name].std() > 0:
            assert tensor.std().item() == pytest.approx(expected[name].std().item(), rel=0.4), name
        elif expected[name].double().var(correction=0) == 0:
            assert tensor.equal(expected[name]), name


def test_weights_can_be_assigned_to_a_meta_model():
    model = nano(0, num_classes=10, device="meta")
    weights = nano(1, num_classes=10).state_dict()
    model.load_state_dict(weights, assign=True)
    assert_equal(model.state_dict(), weights)


def test_numpy_numbers_are_accepted():
    kwargs = {"depths": (1, 1, 1, 1), "groups": (1, 2, 4, 8), "channels": 16, "num_classes": 10}
    floats = {"drop_rate": 0.5, "drop_path_rate": 0.25, "mlp_ratio": 2.0, "cls_scale": 2.0}
    floats |= {"layer_scale": 0.5, "offset_scale": 2.0}
    torch.manual_seed(0)
    expected = FlashInternImage(**kwargs, **floats, in_chans=4, dw_kernel_size=3)
    torch.manual_seed(0)
    actual = FlashInternImage(
        **{name: np.array(value)[()] for name, value in kwargs.items()},
        **{name: np.float32(value) for name, value in floats.items()},
        in_chans=np.int64(4),
        dw_kernel_size=np.int64(3),
    )
    assert_equal(actual.state_dict(), expected.state_dict())
    x = images(1, 4, 64, 64)
    assert actual.eval()(x).equal(expected.eval()(x))
    assert {type(info["num_chs"]) for info in actual.feature_info} == {int}
    assert type(actual.num_classes) is int


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"depths": 4}, r"groups must have one entry per stage \(1\), got \(4, 8, 16, 32\)"),
        ({"depths": (1, 0, 1, 1)}, "depths must be an integer of at least 1, got 0"),
        ({"depths": (), "groups": ()}, "depths must be an integer of at least 1, got 0"),
        ({"groups": (1, 2.5, 4, 8)}, r"groups must be an integer of at least 1, got 2\.5"),
        ({"channels": 0}, "channels must be an integer of at least 2, got 0"),
        ({"channels": "64"}, "channels must be an integer of at least 2, got '64'"),
        ({"in_chans": 0}, "in_chans must be an integer of at least 1, got 0"),
        ({"num_classes": -1}, "num_classes must be an integer of at least 0, got -1"),
        ({"num_classes": 2.5}, r"num_classes must be an integer of at least 0, got 2\.5"),
        ({"global_pool": ""}, r"global_pool must be set for a classifier \(1000 classes\), got ''"),
        ({"global_pool": "mean"}, "global_pool must be '', 'avg', .* got 'mean'"),
        ({"drop_path_rate": -0.1}, r"drop_path_rate must be between 0 and 1, got -0\.1"),
        ({"drop_path_rate": math.nan}, "drop_path_rate must be between 0 and 1, got nan"),
        ({"mlp_ratio": 0}, "mlp_ratio must be positive, got 0"),
        ({"cls_scale": -1.5}, r"cls_scale must be positive, got -1\.5"),
    ],
)
def test_errors_name_arguments_out_of_range(kwargs, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        FlashInternImage(**kwargs, device="meta")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((10,), r"global_pool must be set for a classifier \(10 classes\), got ''"),
        ((10, ""), r"global_pool must be set for a classifier \(10 classes\), got ''"),
        ((-1, "avg"), "num_classes must be an integer of at least 0, got -1"),
        ((10, "mean"), "global_pool must be '', 'avg', .* got 'mean'"),
    ],
)
def test_reset_classifier_rejects_what_the_constructor_rejects(args, message):
    model, x = nano(0, num_classes=0, global_pool=""), images(2, 3, 64, 64)
    with pytest.raises(ValueError, match=f"^{message}$"):
        model.reset_classifier(*args)
    assert model.num_classes == 0
    assert model(x).shape == (2, 384, 2, 2)
    model.reset_classifier(np.int64(10), "avg")
    assert model(x).shape == (2, 10)
