"""Tests of the layers: equality with the published module, geometry, initialization, training."""

import copy
import inspect
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from ops_dcnv4 import DCNv3, DCNv4, DCNv4Conv2d, FlashDeformAttn, dcnv4, output_size

GOLDENS = sorted((Path(__file__).parents[1] / "data" / "module").glob("dcnv4_*.npz"))


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """Randomize all parameters, many of which are initially zero and would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def random_image(*shape: int, dtype=torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# The published module


@pytest.mark.parametrize("as_image", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_published_module(path, dtype, tolerance, as_image, device, assert_near):
    golden = {name: torch.from_numpy(a) for name, a in np.load(path).items() if a.dtype.kind != "U"}
    state = {key[3:]: tensor for key, tensor in golden.items() if key.startswith("sd.")}
    module = DCNv4(**json.loads(str(np.load(path)["config_json"])))
    module.load_state_dict(state)
    module.to(device, dtype)
    assert list(module.state_dict()) == list(state)

    shape = int(golden["H"]), int(golden["W"])
    input = golden["input"].to(device, dtype).requires_grad_()
    if as_image:
        output = module(input.unflatten(1, shape)).flatten(1, 2)
    else:
        output = module(input, None if golden["shape_omitted"] else shape)
    output.backward(golden["grad_output"].to(device, dtype))
    assert_near(output.cpu(), golden["output"], tolerance)
    assert_near(input.grad.cpu(), golden["grad_input"], tolerance)
    for name, parameter in module.named_parameters():
        assert_near(parameter.grad.cpu(), golden[f"grad.{name}"], tolerance)


# Initialization


def test_fresh_module_returns_its_output_bias():
    module = DCNv4(32, dw_kernel_size=3)
    nn.init.normal_(module.output_proj.bias)
    output = module(random_image(2, 5, 6, 32, dtype=torch.float32))
    torch.testing.assert_close(output, module.output_proj.bias.expand(2, 5, 6, 32), rtol=0, atol=0)


def test_initial_parameters():
    module = DCNv4(64, group=4, center_feature_scale=True)
    zeros = ("offset_mask.weight", "offset_mask.bias", "value_proj.bias", "output_proj.bias")
    gates = ("center_feature_scale_proj_weight", "center_feature_scale_proj_bias")
    state = module.state_dict()
    assert not any(state[name].any() for name in (*zeros, *gates))
    bound = (6 / 128) ** 0.5
    for name in ("value_proj.weight", "output_proj.weight"):
        assert 0.98 * bound < state[name].abs().max() <= bound


@pytest.mark.parametrize("group", [1, 3])
def test_initial_modulation_makes_a_fresh_module_average(group, assert_near):
    module = DCNv4(12, group=group, without_pointwise=True, initial_modulation=1 / 9).double()
    x = random_image(2, 5, 6, 12)
    expected = F.avg_pool2d(x.permute(0, 3, 1, 2), 3, stride=1, padding=1).permute(0, 2, 3, 1)
    assert_near(module(x), expected, 1e-7)


LAYERS = {
    "DCNv3": (DCNv3, {"channels": 16, "group": 2, "center_feature_scale": True}),
    "DCNv4": (DCNv4, {"channels": 16, "dw_kernel_size": 3, "center_feature_scale": True}),
    "DCNv4Conv2d": (
        DCNv4Conv2d,
        {"in_channels": 16, "out_channels": 8, "kernel_size": 3, "offset_groups": 2},
    ),
    "FlashDeformAttn": (FlashDeformAttn, {"d_model": 16, "n_levels": 2, "n_heads": 4}),
}
layers = pytest.mark.parametrize(("layer", "options"), LAYERS.values(), ids=LAYERS)


@layers
def test_device_and_dtype_apply_to_all_parameters(layer, options):
    made = layer(**options, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in made.parameters()} == {("meta", torch.float64)}
    with torch.device("meta"):
        assert {p.device.type for p in layer(**options).parameters()} == {"meta"}
        assert {p.device.type for p in layer(**options, device="cpu").parameters()} == {"cpu"}
    skipped = nn.utils.skip_init(layer, **options)
    assert {p.device.type for p in skipped.parameters()} == {"cpu"}


@layers
def test_reset_parameters_initializes_all_parameters(layer, options):
    module = layer(**options, device="meta").to_empty(device="cpu")
    for parameter in module.parameters():
        nn.init.constant_(parameter, 7.0)
    module.reset_parameters()
    fresh = layer(**options).state_dict()
    drawn = ("_proj.weight", "_dw.weight", "_dw.bias", "conv.0.weight", "conv.0.bias")
    for name, tensor in module.state_dict().items():
        assert not (tensor == 7).any()
        if not name.endswith(drawn):
            torch.testing.assert_close(tensor, fresh[name], rtol=0, atol=0)


@layers
def test_numpy_numbers_are_accepted(layer, options):
    kinds = {int: np.int64, bool: np.bool_, float: np.float32}
    converted = {name: kinds[type(option)](option) for name, option in options.items()}
    module, expected = (randomized(layer(**each)) for each in (converted, options))
    assert repr(module) == repr(expected)
    if layer is not FlashDeformAttn:
        x = random_image(1, 16, 16, 16, dtype=torch.float32)
        torch.testing.assert_close(module(x), expected(x), rtol=0, atol=0)


# Geometry

GEOMETRIES = [
    {"stride": 2},
    {"stride": 3, "pad": 0},
    {"kernel_size": 5, "pad": 1, "stride": (2, 1)},
    {"kernel_size": 5, "pad": 0, "dilation": 2},
    {"kernel_size": (2, 4), "pad": (0, 3), "stride": (1, 3)},
    {"kernel_size": 4, "pad": 2, "stride": 2, "dilation": (1, 3)},
    {"kernel_size": 1, "pad": 4},
]
geometries = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
SIZE = (9, 11)


def at_window_centers(image: Tensor, module: DCNv4) -> Tensor:
    """Sample an image at the window centers of a module.

    Args:
        image: Image with margins of 10 pixels (N, C, H + 20, W + 20).
        module: Module that defines the windows.

    Returns:
        Pixels (N, H_out, W_out, C).
    """
    out = output_size(SIZE, module.kernel_size, module.stride, module.pad, module.dilation)
    rows, columns = (
        10 + torch.arange(n) * stride - pad + dilation * (kernel - 1) // 2
        for n, kernel, stride, pad, dilation in zip(
            out, module.kernel_size, module.stride, module.pad, module.dilation, strict=True
        )
    )
    return image[:, :, rows[:, None], columns].permute(0, 2, 3, 1)


@pytest.mark.parametrize("dw_kernel_size", [None, 1, 3, 5])
@geometries
def test_offsets_are_predicted_around_the_window_centers(geometry, dw_kernel_size, assert_near):
    module = randomized(DCNv4(8, group=2, dw_kernel_size=dw_kernel_size, **geometry).double())
    x = random_image(2, *SIZE, 8)
    padded = F.pad(x.permute(0, 3, 1, 2), (10,) * 4)
    if dw_kernel_size is not None:
        conv = module.offset_mask_dw
        padded = F.conv2d(padded, conv.weight, conv.bias, padding="same", groups=8)
    expected = module.offset_mask(at_window_centers(padded, module))
    assert_near(module.predict_offset_mask(x), expected.detach(), 1e-12)
    assert module(x).shape[1:3] == expected.shape[1:3]


@geometries
def test_center_feature_scale_blends_in_the_value_at_the_window_centers(geometry, assert_near):
    module = DCNv4(8, group=2, center_feature_scale=True, without_pointwise=True, **geometry)
    module.double()
    bias = module.center_feature_scale_proj_bias
    bias.data = torch.tensor([0.4, -0.7]).double()
    x = random_image(2, *SIZE, 8)
    padded = F.pad(x.permute(0, 3, 1, 2), (10,) * 4)
    expected = at_window_centers(padded, module) * bias.sigmoid().repeat_interleave(4)
    assert_near(module(x), expected.detach(), 1e-12)


@pytest.mark.parametrize("shape", [(4, 6), (1, 24), None])
def test_sequences_are_images_row_by_row(shape):
    module = randomized(DCNv4(16, group=2, stride=2))
    sequence = random_image(2, 25 if shape is None else 24, 16, dtype=torch.float32)
    image = sequence.unflatten(1, shape or (5, 5))
    expected = module(image).flatten(1, 2)
    torch.testing.assert_close(module(sequence, shape), expected, rtol=0, atol=0)


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group": 3}, "group must .* divide channels=64, got 3"),
        ({"group": 0}, "group must be positive"),
        ({"dw_kernel_size": 4}, "dw_kernel_size must be odd or None, got 4"),
        ({"kernel_size": 0}, "kernel_size must be at least 1"),
        ({"stride": 0}, "stride must be at least 1"),
        ({"pad": -1}, "pad must be at least 0"),
        ({"dilation": 0}, "dilation must be at least 1"),
    ],
)
def test_error_names_the_wrong_constructor_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        DCNv4(**arguments)


@pytest.mark.parametrize(
    ("layer", "arguments", "message"),
    [
        (DCNv4, {"channels": 64.0}, "channels must be an int, got 64.0"),
        (DCNv4, {"group": True}, "group must be an int, got True"),
        (DCNv4, {"kernel_size": [3, 3, 3]}, "kernel_size must be an int or a pair of ints"),
        (DCNv4, {"kernel_size": True}, "kernel_size must be an int or a pair of ints, got True"),
        (DCNv4, {"dw_kernel_size": 3.0}, "dw_kernel_size must be an int, got 3.0"),
        (DCNv4, {"offset_scale": "2"}, "offset_scale must be a number, got '2'"),
        (DCNv4, {"offset_scale": torch.ones(())}, "offset_scale must be a number"),
        (DCNv4, {"remove_center": "no"}, "remove_center must be a bool, got 'no'"),
        (DCNv4, {"without_pointwise": None}, "without_pointwise must be a bool, got None"),
        (DCNv4Conv2d, {"in_channels": None}, "in_channels must be an int, got None"),
        (DCNv4Conv2d, {"groups": 1.0}, "groups must be an int, got 1.0"),
        (DCNv4Conv2d, {"offset_groups": 2.0}, "offset_groups must be an int, got 2.0"),
        (DCNv4Conv2d, {"bias": "auto"}, "bias must be a bool, got 'auto'"),
        (FlashDeformAttn, {"n_points": 4.0}, "n_points must be an int, got 4.0"),
        (FlashDeformAttn, {"d_model": "256"}, "d_model must be an int, got '256'"),
    ],
)
def test_error_names_the_constructor_argument_of_a_wrong_type(layer, arguments, message):
    with pytest.raises(TypeError, match=message):
        layer(**LAYERS[layer.__name__][1] | arguments)


@pytest.mark.parametrize(
    ("input_shape", "shape", "message"),
    [
        ((1, 24, 64), None, "shape must be .* = 24.*not a square"),
        ((1, 24, 64), (4, 5), r"shape must be .* = 24.*got \(4, 5\)"),
        ((1, 4, 6, 64), (6, 4), r"shape must be \(4, 6\) like input, got \(6, 4\)"),
        ((1, 4, 6, 32), None, r"input must be .*64.*got shape \(1, 4, 6, 32\)"),
        ((24, 64), (4, 6), "input must be"),
        ((1, 24, 64), (-4, -6), r"shape must be at least 1, got \(-4, -6\)"),
    ],
)
def test_error_names_the_wrong_input(input_shape, shape, message):
    with pytest.raises(ValueError, match=message):
        DCNv4()(torch.zeros(input_shape), shape)


@pytest.mark.parametrize("shape", [(4.0, 6.0), (4, 6, 1), "4x6"], ids=str)
def test_error_names_a_shape_of_a_wrong_type(shape):
    with pytest.raises(TypeError, match="shape must be an int or a pair of ints"):
        DCNv4()(torch.zeros(1, 24, 64), shape)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
@layers
def test_torch_jit_script_is_rejected_with_the_alternatives(layer, options):
    network = nn.Sequential(nn.Identity(), layer(**options))
    message = f"{layer.__name__} cannot be compiled by torch.jit.script: use torch.export"
    with pytest.raises(NotImplementedError, match=message):
        torch.jit.script(network)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("stride", [1, 2])
def test_traced_layers_accept_other_sizes(stride):
    module = randomized(DCNv4(16, group=2, stride=stride))
    example, other = (
        random_image(*size, 16, dtype=torch.float32) for size in ((1, 6, 7), (2, 9, 8))
    )
    traced = torch.jit.trace(module, example)
    torch.testing.assert_close(traced(other), module(other))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 2}, "groups must be 1, .* got 2; offset_groups sets the groups"),
        ({"groups": 0}, "groups must be 1, .* got 0"),
        ({"offset_groups": 3}, "offset_groups must .* divide in_channels=16, got 3"),
        ({"offset_groups": 0}, "offset_groups must be positive"),
        ({"padding": "same", "stride": 2}, "padding must .* 'same' with stride 1"),
        ({"padding": "same", "kernel_size": 4}, "padding must .* odd window"),
        ({"padding": "reflect"}, "padding must be ints.* got 'reflect'"),
        ({"padding_mode": "circular"}, "padding_mode must be 'zeros', got 'circular'"),
        ({"out_channels": 0}, "out_channels must be at least 1, got 0"),
    ],
)
def test_error_names_the_wrong_conv2d_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        DCNv4Conv2d(**{"in_channels": 16, "out_channels": 8, "kernel_size": 3} | arguments)


@pytest.mark.parametrize("shape", [(1, 8, 5, 5), (16, 5, 5)])
def test_error_names_the_wrong_conv2d_input(shape):
    with pytest.raises(ValueError, match=r"input must be \(N, 16, H, W\)"):
        DCNv4Conv2d(16, 8, 3)(torch.zeros(shape))


# A drop-in for nn.Conv2d


@pytest.mark.parametrize("dilation", [1, (2, 1)])
@pytest.mark.parametrize("padding", [0, 1, (2, 1), "valid"])
@pytest.mark.parametrize("stride", [1, 2, (1, 3)])
@pytest.mark.parametrize("kernel_size", [1, 3, 4, (2, 5)])
def test_conv2d_has_the_output_shape_of_nn_conv2d(kernel_size, stride, padding, dilation):
    arguments = (6, 10, kernel_size, stride, padding, dilation)
    x = torch.zeros(2, 6, 9, 8)
    assert DCNv4Conv2d(*arguments)(x).shape == nn.Conv2d(*arguments)(x).shape


def test_conv2d_has_the_arguments_and_attributes_of_nn_conv2d():
    own, plain = (inspect.signature(layer).parameters for layer in (DCNv4Conv2d, nn.Conv2d))
    assert list(own) == [*plain, "offset_groups"]
    assert own["offset_groups"].kind == inspect.Parameter.KEYWORD_ONLY
    for name in plain:
        assert own[name].default == plain[name].default, name
    for options in ((3, 2, 1, (2, 1)), (3, 1, "same"), (3, 1, "valid", 1, 1, False, "zeros")):
        ours, plain = (layer(6, 10, *options) for layer in (DCNv4Conv2d, nn.Conv2d))
        for name in (*nn.Conv2d.__constants__, "transposed"):
            assert getattr(ours, name) == getattr(plain, name), name
        assert (ours.bias is None) == (plain.bias is None)


def test_conv2d_uses_attributes_changed_after_construction(assert_near):
    module = randomized(DCNv4Conv2d(16, 10, 3, padding=1)).double()
    changed = randomized(DCNv4Conv2d(16, 10, 3, stride=2, padding=2, dilation=2)).double()
    module.stride, module.padding, module.dilation = (2, 2), (2, 2), (2, 2)
    x = random_image(2, 16, 9, 8)
    assert_near(module(x), changed(x).detach(), 1e-12)


def test_conv2d_predicts_offsets_for_each_offset_group(assert_near):
    assert DCNv4Conv2d(48, 8, 3).offset_groups == 3
    assert DCNv4Conv2d(40, 8, 3).offset_groups == 1
    module = randomized(DCNv4Conv2d(16, 10, 3, padding=1, offset_groups=4)).double()
    x = random_image(2, 16, 9, 8)
    image = x.permute(0, 2, 3, 1)
    offset_mask = module.offset_mask(image)
    assert offset_mask.shape[-1] == 3 * 4 * 9 + 4  # padded to a multiple of 8
    output = dcnv4(module.value_proj(image), offset_mask, groups=4)
    assert_near(module(x), module.output_proj(output).permute(0, 3, 1, 2).detach(), 1e-12)


def test_conv2d_has_the_state_dict_of_three_linear_layers():
    names = ["offset_mask", "value_proj", "output_proj"]
    expected = [f"{name}.{parameter}" for name in names for parameter in ("weight", "bias")]
    assert list(DCNv4Conv2d(16, 10, 3).state_dict()) == expected


def test_fresh_conv2d_averages_over_its_window(assert_near):
    module = DCNv4Conv2d(16, 16, (3, 5), padding=(1, 2), offset_groups=2).double()
    with torch.no_grad():
        for projection in (module.value_proj, module.output_proj):
            projection.weight.copy_(torch.eye(16))
    x = random_image(2, 16, 7, 6)
    assert_near(module(x), F.avg_pool2d(x, (3, 5), 1, (1, 2)), 1e-7)


@pytest.mark.parametrize(("kernel_size", "dilation"), [(3, 1), ((1, 5), 2), ((7, 2), (1, 2))])
def test_conv2d_with_same_padding_keeps_the_image_size(kernel_size, dilation):
    module = DCNv4Conv2d(6, 10, kernel_size, padding="same", dilation=dilation)
    assert module(torch.zeros(2, 6, 9, 8)).shape == (2, 10, 9, 8)


@pytest.mark.parametrize(
    "arguments", [{"stride": 2, "padding": 1}, {"offset_groups": 4, "bias": False}]
)
def test_conv2d_trains_all_parameters_from_the_first_step(arguments):
    module = DCNv4Conv2d(16, 10, 3, **arguments)
    module(random_image(2, 16, 7, 6, dtype=torch.float32)).square().sum().backward()
    assert all(parameter.grad.any() for parameter in module.parameters())
    assert (module.output_proj.bias is not None) == arguments.get("bias", True)


def test_conv2d_trains_in_a_sequential():
    torch.manual_seed(0)
    network = nn.Sequential(
        DCNv4Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        DCNv4Conv2d(8, 2, 3, stride=2, padding=1),
    )
    x, target = torch.randn(4, 3, 8, 8), torch.randn(4, 2, 4, 4)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(network(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# torch.compile, torch.export, autocast and copies


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "dynamic"), [({"center_feature_scale": True}, False), ({"stride": 2}, True)]
)
def test_torch_compile_equals_eager(arguments, dynamic, assert_near):
    module = randomized(DCNv4(16, group=2, dw_kernel_size=3, **arguments).double())
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in ((7, 6), (8, 9)):
        x = random_image(2, *size, 16).requires_grad_()
        inputs = (x, *module.parameters())
        outputs = module(x), compiled(x)
        expected, actual = (torch.autograd.grad(y.square().sum(), inputs) for y in outputs)
        assert_near(outputs[1], outputs[0].detach(), 1e-12)
        for a, e in zip(actual, expected, strict=True):
            assert_near(a, e, 1e-12)


def export_with_dynamic_sizes(module: nn.Module, example: Tensor, axes: str):
    """Export a module whose input may have any sizes of at least 4 along the named axes."""
    dims = {i: torch.export.Dim(axis, min=4) for i, axis in enumerate(axes) if axis != "c"}
    return torch.export.export(module, (example,), dynamic_shapes={"input": dims}).module()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2},
        {"stride": 2, "dw_kernel_size": 3},
        {"stride": (3, 2), "center_feature_scale": True},
        {"stride": 2, "kernel_size": 2, "pad": 0},
    ],
    ids=str,
)
def test_exports_with_dynamic_batch_and_image_size(options):
    module = randomized(DCNv4(16, group=2, **options))
    sizes = ((4, 7, 6), (5, 10, 13), (4, 11, 8), (5, 12, 9))
    example, *others = (random_image(*size, 16, dtype=torch.float32) for size in sizes)
    program = export_with_dynamic_sizes(module, example, "nhwc")
    for other in others:
        torch.testing.assert_close(program(other), module(other))


@pytest.mark.parametrize("stride", [1, 2])
def test_conv2d_exports_with_dynamic_batch_and_image_size(stride):
    module = randomized(DCNv4Conv2d(16, 8, 3, stride, padding=1))
    program = export_with_dynamic_sizes(module, torch.ones(4, 16, 7, 6), "nchw")
    for size in ((5, 10, 13), (5, 11, 8)):
        other = random_image(size[0], 16, *size[1:], dtype=torch.float32)
        torch.testing.assert_close(program(other), module(other))


def test_export_with_a_dynamic_length_requires_the_shape():
    module = randomized(DCNv4(16, group=2))
    sequence, other = (random_image(2, n, 16, dtype=torch.float32) for n in (24, 42))
    size = torch.export.Dim.DYNAMIC
    shapes = {"input": {1: size}, "shape": (size, size)}
    program = torch.export.export(module, (sequence, (4, 6)), dynamic_shapes=shapes).module()
    torch.testing.assert_close(program(other, (6, 7)), module(other, (6, 7)))
    with pytest.raises(ValueError, match=r"shape must be \(H, W\) to export a dynamic length"):
        export_with_dynamic_sizes(module, torch.ones(4, 25, 16), "nlc")


@pytest.mark.slow
def test_square_sequences_of_any_length_are_compiled_once():
    module = randomized(DCNv4(16, group=2))
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for side in (5, 6, 9):
        sequence = random_image(2, side**2, 16, dtype=torch.float32)
        torch.testing.assert_close(compiled(sequence), module(sequence))
    assert counter.frame_count == 1


def test_autocast_runs_in_bfloat16():
    module = randomized(DCNv4(32, stride=2, dw_kernel_size=3, center_feature_scale=True))
    x = random_image(2, 7, 6, 32, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x)
    output.float().square().mean().backward()
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), module(x), rtol=0.1, atol=0.3)
    for tensor in (x, *module.parameters()):
        assert tensor.grad.dtype == torch.float32
        assert tensor.grad.isfinite().all()


def test_autocast_leaves_a_float64_module_alone():
    module = randomized(DCNv4(32).double())
    x = random_image(2, 7, 6, 32)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x)
    torch.testing.assert_close(output, module(x), rtol=0, atol=0)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_give_the_same_results(duplicate):
    module = randomized(DCNv4Conv2d(16, 10, (2, 3), stride=2, padding=1, offset_groups=2))
    x = random_image(2, 16, 7, 6, dtype=torch.float32)
    torch.testing.assert_close(duplicate(module)(x), module(x), rtol=0, atol=0)


def test_state_dict_restores_the_results():
    arguments = {"group": 2, "dw_kernel_size": 3, "center_feature_scale": True}
    module, other = (randomized(DCNv4(16, **arguments), seed) for seed in (0, 1))
    other.load_state_dict(module.state_dict())
    x = random_image(2, 5, 6, 16, dtype=torch.float32)
    torch.testing.assert_close(other(x), module(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "size"),
    [({"kernel_size": 7}, 4), ({"kernel_size": 3, "dilation": 4}, 8), ({"kernel_size": (1, 5)}, 4)],
)
@pytest.mark.parametrize("stride", [1, 2])
def test_error_names_a_window_larger_than_the_image(arguments, size, stride):
    with pytest.raises(ValueError, match=rf"input of {size} x {size} is too small for kernel_size"):
        DCNv4Conv2d(16, 32, **arguments, stride=stride)(torch.randn(1, 16, size, size))
