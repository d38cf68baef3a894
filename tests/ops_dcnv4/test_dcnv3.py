"""Tests of DCNv3: equality with the published operator and layer, geometry, errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops_dcnv4 import DCNv3, dcnv3

DATA = Path(__file__).parents[1] / "data" / "dcnv3"
dtypes = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=str
)


def goldens(kind: str) -> pytest.MarkDecorator:
    paths = sorted(DATA.glob(f"{kind}_*.npz"))
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def tensors(path: Path) -> dict[str, Tensor]:
    return {name: torch.from_numpy(a) for name, a in np.load(path).items() if a.dtype.kind != "U"}


@dtypes
@goldens("core")
def test_published_operator(path, dtype, tolerance, device, assert_near):
    golden = tensors(path)
    value, offset, scores = (
        golden[name].to(device, dtype).requires_grad_()
        for name in ("value", "offset", "mask_logits")
    )
    groups = int(golden["group"])
    mask = scores.unflatten(-1, (groups, -1)).softmax(-1).flatten(-2)
    pairs = (
        (int(golden[f"{name}_h"]), int(golden[f"{name}_w"]))
        for name in ("kernel", "stride", "pad", "dilation")
    )
    options = groups, float(golden["offset_scale"]), bool(golden["remove_center"])
    output = dcnv3(value, offset, mask, *pairs, *options)
    output.backward(golden["grad_output"].to(device, dtype))
    assert_near(output.cpu(), golden["output"], tolerance)
    for name, tensor in (("value", value), ("offset", offset), ("mask_logits", scores)):
        assert_near(tensor.grad.cpu(), golden[f"grad_{name}"], tolerance)


@dtypes
@goldens("module")
def test_published_layer(path, dtype, tolerance, device, assert_near):
    golden = tensors(path)
    state = {key[3:]: tensor for key, tensor in golden.items() if key.startswith("sd.")}
    layer = DCNv3(**json.loads(str(np.load(path)["config_json"])))
    layer.load_state_dict(state)
    layer.to(device, dtype)
    assert list(layer.state_dict()) == list(state)
    input = golden["input"].to(device, dtype).requires_grad_()
    output = layer(input)
    output.backward(golden["grad_output"].to(device, dtype))
    assert_near(output.cpu(), golden["output"], tolerance)
    assert_near(input.grad.cpu(), golden["grad_input"], tolerance)
    for name, parameter in layer.named_parameters():
        assert_near(parameter.grad.cpu(), golden[f"grad.{name}"], tolerance)


@pytest.mark.parametrize("norm", ["LN", "BN"])
def test_a_fresh_layer_averages_over_its_window(norm, assert_near):
    layer = DCNv3(12, group=3, norm_layer=norm, act_layer="SiLU", stride=2).double()
    x = torch.randn(2, 7, 6, 12, generator=torch.Generator().manual_seed(0)).double()
    value = layer.input_proj(x).permute(0, 3, 1, 2)
    mean = F.avg_pool2d(value, 3, stride=2, padding=1).permute(0, 2, 3, 1)
    assert_near(layer(x), layer.output_proj(mean), 1e-12)


def test_a_batch_norm_replaces_the_layer_norm():
    names = [name for name in DCNv3(8, norm_layer="BN").state_dict() if "dw_conv" in name]
    assert names[2:4] == ["dw_conv.1.0.weight", "dw_conv.1.0.bias"]


def test_a_window_without_taps_has_no_value():
    layer = DCNv3(8, kernel_size=1, pad=0, group=2, remove_center=True)
    nn.init.normal_(layer.output_proj.bias)
    expected = layer.output_proj.bias.expand(1, 3, 4, 8)
    torch.testing.assert_close(layer(torch.randn(1, 3, 4, 8)), expected)


def test_autocast_keeps_the_dtype_of_the_value():
    layer, x = DCNv3(16).requires_grad_(False), torch.randn(1, 4, 4, 16)
    nn.init.normal_(layer.mask.weight)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), layer(x), rtol=0.05, atol=0.05)


VALUE, OFFSET, MASK = torch.zeros(1, 4, 4, 8), torch.zeros(1, 4, 4, 36), torch.zeros(1, 4, 4, 18)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((VALUE, OFFSET[..., :35], MASK), r"offset must have 36 channels \(2 \* groups \* taps"),
        ((VALUE, OFFSET, OFFSET), r"mask must have 18 channels .*, got 36"),
        ((VALUE, OFFSET, MASK[:, :3]), r"mask must be \(1, 4, 4, ...\) like the output, got"),
        ((VALUE, OFFSET[0], MASK), r"offset must be \(N, H, W, C\)"),
        ((VALUE, OFFSET, MASK.double()), "value and mask must have one dtype"),
        ((VALUE[..., :7], OFFSET, MASK), "groups must be positive and divide the channels"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        dcnv3(*arguments, groups=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": 3}, "group must be positive and divide channels=64, got 3"),
        ({"act_layer": "Tanh"}, "act_layer must be 'GELU', 'ReLU' or 'SiLU', got 'Tanh'"),
        ({"norm_layer": "GN"}, "norm_layer must be 'LN' or 'BN', got 'GN'"),
        ({"dw_kernel_size": 4}, "dw_kernel_size must be odd or None, got 4"),
        ({"kernel_size": (3, 5)}, r"dw_kernel_size must be given for kernel_size \(3, 5\)"),
    ],
)
def test_unsupported_layers_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        DCNv3(**options)
