"""Compare patched DeformConv2d layers of torchvision with the originals."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from ops_dcnv4.integrations import deform_conv2d, patch, unpatch

torchvision = pytest.importorskip("torchvision")

CASES = {
    "plain": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2},
    "oblong": {"kernel_size": (2, 5), "stride": (1, 2), "padding": (0, 2), "bias": False},
}
CHANNELS, HEIGHT, WIDTH = 8, 9, 11


def make_layer(offset_groups: int, **options) -> nn.Module:
    """Return a frozen depth-wise layer whose offset groups share weights."""
    layer = torchvision.ops.DeformConv2d(CHANNELS, CHANNELS, groups=CHANNELS, **options).double()
    nn.init.normal_(layer.weight)
    with torch.no_grad():
        layer.weight[:] = layer.weight[:: CHANNELS // offset_groups].repeat_interleave(
            CHANNELS // offset_groups, 0
        )
    layer.weight.requires_grad_(False)
    return layer


def random_inputs(layer: nn.Module, offset_groups: int, masked: bool) -> list[Tensor]:
    value = torch.randn(2, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64)
    sizes = nn.functional.conv2d(
        value, layer.weight, None, layer.stride, layer.padding, layer.dilation, CHANNELS
    ).shape[2:]
    taps = offset_groups * layer.weight[0, 0].numel()
    inputs = [value, 2 * torch.randn(2, 2 * taps, *sizes, dtype=torch.float64)]
    if masked:
        inputs.append(torch.rand(2, taps, *sizes, dtype=torch.float64))
    return [tensor.requires_grad_() for tensor in inputs]


def run(layer: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [*inputs, *(p for p in layer.parameters() if p.requires_grad)]
    output = layer(*inputs)
    return [output, *torch.autograd.grad(output.square().sum(), leaves)]


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no_mask"])
@pytest.mark.parametrize("offset_groups", [1, 2])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_patched_layer_equals_the_original(options, offset_groups, masked):
    layer = make_layer(offset_groups, **options)
    inputs = random_inputs(layer, offset_groups, masked)
    expected = run(layer, inputs)
    model = nn.ModuleDict({"conv": layer})
    assert patch(model).patched == {"conv": "DeformConv2d"}
    patched = run(layer, inputs)
    for a, e in zip(patched, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)
    assert not torch.equal(patched[1], expected[1])  # computed by other code
    assert patched[0].is_contiguous()
    assert unpatch(model) == ("conv",)
    for a, e in zip(run(layer, inputs), expected, strict=True):
        assert torch.equal(a, e)


def test_copies_and_compiled_layer():
    layer = make_layer(2, kernel_size=3, padding=1)
    inputs = random_inputs(layer, 2, masked=True)
    patch(layer)
    expected = layer(*inputs)
    graphs = []
    compiled = torch.compile(layer, backend=lambda g, _: graphs.append(str(g.graph)) or g)
    for function in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), compiled):
        assert torch.equal(function(*inputs), expected)
    assert "ops_dcnv4.dcnv4" in graphs[0]
    with torch.no_grad():
        layer.weight[1] += 1
    with pytest.raises(RuntimeError, match="weight must be equal over the channels"):
        compiled(*inputs)


def conv(**options) -> nn.Module:
    return torchvision.ops.DeformConv2d(4, **{"out_channels": 4, "kernel_size": 3} | options)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (conv(), r"must be depth-wise .*, got 4 and 4 channels in 1 groups"),
        (
            conv(out_channels=8, groups=4),
            r"must be depth-wise .*, got 4 and 8 channels in 4 groups",
        ),
        (conv(groups=4), r"weight must be frozen \(requires_grad_\(False\)\)"),
        (conv(groups=4).requires_grad_(False), "weight must be equal over the channels"),
    ],
)
def test_layers_that_dcnv4_cannot_express(layer, reason):
    with pytest.raises(ValueError, match=f"model must have .*the layer: its? .*{reason}"):
        patch(layer)
    assert type(layer) is torchvision.ops.DeformConv2d


def test_other_layers_of_the_model_are_patched():
    model = nn.Sequential(make_layer(1, kernel_size=3), conv(), conv(groups=4))
    with pytest.warns(UserWarning, match="patch left 2 layers unchanged: 1: it must be depth-wise"):
        report = patch(model)
    assert (list(report.patched), list(report.skipped)) == (["0"], ["1", "2"])


def test_function_rejects_what_dcnv4_cannot_express():
    value, offset = torch.zeros(1, 4, 5, 5), torch.zeros(1, 18, 5, 5)
    ones = torch.ones(4, 1, 3, 3)
    differing = torch.arange(4.0).view(4, 1, 1, 1).expand_as(ones)
    for changes, reason in (
        (
            {"weight": torch.ones(4, 4, 3, 3)},
            r"weight must be depth-wise, .* C = 4 .*\(4, 4, 3, 3\)",
        ),
        ({"weight": differing}, "weight must be equal over .* 1 offset groups; use torchvision's"),
        ({"weight": ones.clone().requires_grad_()}, "weight must not require a gradient"),
        ({"offset": torch.zeros(1, 54, 5, 5)}, "offset must have 2 .* G dividing .*input .4."),
        ({"offset": torch.zeros(1, 9, 5, 5)}, "offset must have 2 "),
        ({"mask": torch.zeros(1, 8, 5, 5)}, r"mask must .* \(1, 9, 5, 5\), got \(1, 8, 5, 5\)"),
    ):
        with pytest.raises(ValueError, match=reason):
            deform_conv2d(**{"input": value, "offset": offset, "weight": ones} | changes, padding=1)
    with torch.no_grad():
        frozen = deform_conv2d(value, offset, ones.clone().requires_grad_(), padding=1)
    assert frozen.shape == value.shape


def test_empty_batches():
    layer = make_layer(2, kernel_size=3, padding=1)
    inputs = [torch.empty(0, n, 6, 6, dtype=torch.float64) for n in (CHANNELS, 36, 18)]
    expected = layer(*inputs)
    patch(layer)
    assert layer(*inputs).shape == expected.shape


def test_channels_may_each_have_offsets():
    layer = make_layer(CHANNELS, kernel_size=3, padding=1)
    inputs = random_inputs(layer, CHANNELS, masked=True)
    tensors = inputs[0], inputs[1], layer.weight, layer.bias
    options = {"padding": 1, "mask": inputs[2]}
    expected = torchvision.ops.deform_conv2d(*tensors, **options)
    torch.testing.assert_close(deform_conv2d(*tensors, **options), expected)
