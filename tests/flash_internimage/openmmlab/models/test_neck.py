"""Compare the feature pyramid with a NumPy implementation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.registry import MODELS
from torch import Tensor

from flash_internimage.openmmlab import LayerNormFPN

DATA = Path(__file__).parents[3] / "data" / "openmmlab_schemas"
SCHEMA = DATA / "mask_rcnn_flash_intern_image_t_fpn_1x_coco.json"
SIZES = {"even": [(16, 24), (8, 12), (4, 6), (2, 3)], "odd": [(15, 21), (8, 11), (4, 6), (2, 3)]}


def feature_maps(sizes: list[tuple[int, int]]) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(2, 3 + i, *size, dtype=torch.float64) for i, size in enumerate(sizes)]


def neck(num_outs: int = 5) -> LayerNormFPN:
    torch.manual_seed(0)
    model = LayerNormFPN([3, 4, 5, 6], out_channels=8, num_outs=num_outs).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def convolution(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Convolve (N, C, H, W) with zero padding that keeps the size."""
    side = weight.shape[-1]
    x = np.pad(x, [(0, 0), (0, 0), (side // 2,) * 2, (side // 2,) * 2])
    windows = np.lib.stride_tricks.sliding_window_view(x, (side, side), axis=(2, 3))
    return np.einsum("nchwij,ocij->nohw", windows, weight)


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Normalize over the channels of each pixel."""
    mean, variance = x.mean(1, keepdims=True), x.var(1, keepdims=True)
    x = (x - mean) / np.sqrt(variance + 1e-5)
    return x * weight[:, None, None] + bias[:, None, None]


def nearest(x: np.ndarray, height: int, width: int) -> np.ndarray:
    rows = np.arange(height) * x.shape[2] // height
    return x[:, :, rows][..., np.arange(width) * x.shape[3] // width]


def pyramid(maps: list[Tensor], weights: dict[str, Tensor], num_outs: int) -> list[np.ndarray]:
    arrays = {name: weight.numpy() for name, weight in weights.items()}

    def layer(name: str, x: np.ndarray) -> np.ndarray:
        x = convolution(x, arrays[f"{name}.conv.weight"])
        return layer_norm(x, arrays[f"{name}.ln.weight"], arrays[f"{name}.ln.bias"])

    outputs, above = [], 0.0
    for i in reversed(range(len(maps))):
        lateral = layer(f"lateral_convs.{i}", maps[i].numpy())
        if outputs:
            lateral = lateral + nearest(above, *lateral.shape[2:])
        above = lateral
        outputs.insert(0, layer(f"fpn_convs.{i}", lateral))
    while len(outputs) < num_outs:
        outputs.append(outputs[-1][:, :, ::2, ::2])
    return outputs


@pytest.mark.parametrize("num_outs", [4, 5, 6])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@torch.no_grad()
def test_outputs_equal_those_of_numpy(sizes, num_outs, assert_near):
    model, maps = neck(num_outs), feature_maps(sizes)
    outputs = model(maps)
    assert isinstance(outputs, tuple)
    expected = pyramid(maps, model.state_dict(), num_outs)
    assert len(outputs) == len(expected) == num_outs
    for actual, array in zip(outputs, expected, strict=True):
        assert_near(actual, torch.from_numpy(array), 1e-12)


def test_inputs_are_unchanged():
    maps = feature_maps(SIZES["odd"])
    copies = [x.clone() for x in maps]
    neck()(maps)
    assert all(x.equal(copy) for x, copy in zip(maps, copies, strict=True))


@torch.no_grad()
def test_outputs_are_contiguous_as_roi_align_requires():
    for layout in (torch.contiguous_format, torch.channels_last):
        outputs = neck()([x.to(memory_format=layout) for x in feature_maps(SIZES["even"])])
        assert all(x.is_contiguous() for x in outputs)


def test_all_parameters_receive_a_gradient():
    model = neck()
    sum(output.square().sum() for output in model(feature_maps(SIZES["even"]))).backward()
    assert [name for name, p in model.named_parameters() if not p.grad.any()] == []


@pytest.mark.parametrize("registry", [MODELS, MMDET_MODELS], ids=["root", "mmdet"])
def test_names_and_shapes_are_the_published_ones(registry):
    published = json.loads(SCHEMA.read_text())
    expected = {
        name.removeprefix("neck."): shape
        for name, shape in published.items()
        if name.startswith("neck.")
    }
    config = {"type": "LayerNormFPN", "in_channels": [64, 128, 256, 512], "out_channels": 256}
    weights = registry.build({**config, "num_outs": 5}).state_dict()
    assert {name: list(weight.shape) for name, weight in weights.items()} == expected
    assert len(expected) == 24


def test_initial_convolutions_are_xavier_uniform():
    torch.manual_seed(0)
    model = LayerNormFPN([64], 64, 1)
    model.init_weights()
    for conv, fan in ((model.lateral_convs[0].conv, 64 + 64), (model.fpn_convs[0].conv, 9 * 128)):
        bound = (6 / fan) ** 0.5
        assert 0.99 * bound < conv.weight.abs().max() <= bound
        assert conv.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_fewer_outputs_than_inputs_are_an_error():
    message = r"num_outs must be at least the number of in_channels \(4\), got 3"
    with pytest.raises(ValueError, match=message):
        neck(num_outs=3)


@pytest.mark.parametrize("count", [0, 3])
def test_wrong_number_of_feature_maps_is_an_error(count):
    with pytest.raises(ValueError, match=f"inputs must hold 4 feature maps, got {count}"):
        neck()(feature_maps(SIZES["even"])[:count])
