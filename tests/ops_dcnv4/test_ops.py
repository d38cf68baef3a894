"""The operator: values, gradients, edge cases, errors, and its life with the rest of PyTorch."""

import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ops_dcnv4 import dcnv4, is_compiled, output_size, reference

GOLDENS = sorted((Path(__file__).parents[1] / "data" / "op").glob("*.npz"))
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Parameters(NamedTuple):
    """The operator's parameters in the order of its schema."""

    kernel_size: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 2
    offset_scale: float = 1.0
    remove_center: bool = False

    @property
    def taps(self) -> int:
        return math.prod(self.kernel_size) - self.remove_center


class Tensors(NamedTuple):
    value: Tensor
    offset_mask: Tensor
    grad_output: Tensor

    def to(self, dtype_or_device) -> "Tensors":
        return Tensors(*(tensor.to(dtype_or_device) for tensor in self))


def random_tensors(
    p: Parameters, batch=2, size=(7, 6), group_channels=5, padding_channels=3, spread=1.0, seed=0
) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    channels, out = p.groups * group_channels, output_size(size, *p[:4])
    packed = normal(batch, *out, p.groups, 3 * p.taps)
    packed[..., : 2 * p.taps] *= spread
    return Tensors(
        normal(batch, *size, channels),
        torch.cat((packed.flatten(3), normal(batch, *out, padding_channels)), dim=-1),
        normal(batch, *out, channels),
    )


class Result(NamedTuple):
    output: Tensor
    grad_value: Tensor
    grad_offset_mask: Tensor


def run_operator(tensors: Tensors, p: Parameters) -> Result:
    value, offset_mask = (t.detach().requires_grad_() for t in tensors[:2])
    output = dcnv4(value, offset_mask, *p)
    grads = torch.autograd.grad(output, (value, offset_mask), tensors.grad_output)
    return Result(output.detach(), *grads)


def run_reference(tensors: Tensors, p: Parameters) -> Result:
    value, offset_mask, grad_output = tensors
    output = reference.dcnv4(value, offset_mask, *p)
    return Result(output, *reference.dcnv4_backward(grad_output, value, offset_mask, *p))


def assert_equal(actual: Result, expected: Result) -> None:
    """Bit for bit."""
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


backends = pytest.mark.parametrize("run", [run_operator, run_reference])


def test_the_compiled_kernels_are_under_test():
    assert is_compiled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_operator(random_tensors(Parameters()), Parameters())


# Values and gradients


@backends
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_published_operator(path, dtype, tolerance, run, assert_near):
    golden = np.load(path)

    def pair(name):
        return int(golden[f"{name}_h"]), int(golden[f"{name}_w"])

    p = Parameters(
        *map(pair, ("kernel", "stride", "pad", "dilation")),
        int(golden["group"]),
        float(golden["offset_scale"]),
        bool(golden["remove_center"]),
    )
    tensors = Tensors(*(torch.from_numpy(golden[name]) for name in Tensors._fields)).to(dtype)
    result = run(tensors, p)
    for name, actual in result._asdict().items():
        assert actual.dtype == dtype
        assert_near(actual, torch.from_numpy(golden[name]), tolerance)
    assert not result.grad_offset_mask[..., 3 * p.groups * p.taps :].any()


VARIED = [
    Parameters(),
    Parameters(stride=(2, 2), offset_scale=0.5),
    Parameters(kernel_size=(2, 4), padding=(0, 2), groups=1),
    Parameters(stride=(1, 3), dilation=(2, 1), offset_scale=2.0, remove_center=True),
]
varied = pytest.mark.parametrize("p", VARIED, ids=["default", "strided", "even", "remove_center"])


@varied
def test_reference_backward_is_the_derivative_of_its_forward(p, assert_near):
    tensors = random_tensors(p)
    value, offset_mask = (t.requires_grad_() for t in tensors[:2])
    output = reference.dcnv4(value, offset_mask, *p)
    by_autograd = torch.autograd.grad(output, (value, offset_mask), tensors.grad_output)
    by_formula = reference.dcnv4_backward(tensors.grad_output, value, offset_mask, *p)
    for actual, expected in zip(by_formula, by_autograd, strict=True):
        assert_near(actual, expected, 1e-12)


@varied
def test_gradients_are_those_of_finite_differences(p):
    tensors = random_tensors(p, batch=1, size=(4, 5), group_channels=3)
    fraction = 0.2 + 0.2 * tensors.offset_mask.sigmoid()  # no coordinate is near an integer
    offset_mask = tensors.offset_mask.clamp(-1, 1).round() + fraction
    inputs = (tensors.value.requires_grad_(), offset_mask.requires_grad_())
    assert torch.autograd.gradcheck(lambda v, o: dcnv4(v, o, *p), inputs)


def pairs(low: int, high: int):
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def problems(draw) -> tuple[Parameters, dict]:
    p = Parameters(
        kernel_size=draw(pairs(1, 4)),
        stride=draw(pairs(1, 3)),
        padding=draw(pairs(0, 3)),
        dilation=draw(pairs(1, 2)),
        groups=draw(st.integers(1, 3)),
        offset_scale=draw(st.sampled_from([0.3, 0.5, 1.0, 2.0])),
        remove_center=draw(st.booleans()),
    )
    smallest = (
        max(1, d * (k - 1) + 1 - 2 * pad)
        for k, pad, d in zip(p.kernel_size, p.padding, p.dilation, strict=True)
    )
    return p, {
        "size": tuple(n + extra for n, extra in zip(smallest, draw(pairs(0, 6)), strict=True)),
        "batch": draw(st.integers(0, 3)),
        "group_channels": draw(st.sampled_from([1, 3, 5, 16, 20, 33]) | st.integers(1, 40)),
        "padding_channels": draw(st.integers(0, 9)),
        "spread": draw(st.sampled_from([0.5, 3.0, 30.0])),
        "seed": draw(st.integers(0, 999)),
    }


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=problems())
def test_operator_equals_reference_for_all_parameters(problem, assert_near):
    p, shapes = problem
    tensors = random_tensors(p, **shapes)
    for actual, expected in zip(run_operator(tensors, p), run_reference(tensors, p), strict=True):
        assert_near(actual, expected, 1e-11)


@backends
def test_edges_are_exclusive_and_slopes_at_pixels_look_forward(run):
    p = Parameters(kernel_size=(1, 1), padding=(0, 0), groups=1)
    value = torch.tensor([1.0, 2, 4, 8]).view(1, 1, 4, 1)
    offset_mask = torch.zeros(1, 1, 4, 3)
    offset_mask[0, 0, :, 0] = torch.tensor([-1, 0, 1, 1])  # reads columns -1, 1, 3 and 4 of 0..3
    offset_mask[..., 2] = 1
    result = run(Tensors(value, offset_mask, torch.ones(1, 1, 4, 1)), p)
    grad_x, grad_y, grad_modulation = result.grad_offset_mask[0, 0].T.tolist()
    assert result.output.flatten().tolist() == [0, 2, 8, 0]
    assert result.grad_value.flatten().tolist() == [0, 1, 0, 1]
    assert grad_x == [0, 2, -8, 0]
    assert grad_y == [0, -2, -8, 0]
    assert grad_modulation == [0, 2, 8, 0]


# 16-bit dtypes


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [Parameters(), Parameters(stride=(2, 1), offset_scale=2.0)])
def test_16_bit_results_are_rounded_only_once(p, dtype, run):
    tensors = random_tensors(p, group_channels=20).to(dtype)
    exact = run_reference(tensors.to(torch.float64), p)
    for actual, expected in zip(run(tensors, p), exact, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(
            actual.double(),
            expected,
            rtol=0.51 * torch.finfo(dtype).eps,
            atol=2e-6 * expected.abs().max().item(),
        )


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
class TestSumsIn32Bits:
    """2304 ones: counting in 16 bits stops at 256 (bfloat16) or 2048 (float16)."""

    def test_over_the_taps(self, dtype, run):
        p = Parameters(kernel_size=(48, 48), padding=(0, 0), groups=1)
        offset_mask = torch.cat((torch.zeros(2 * p.taps), torch.ones(p.taps)))
        ones = torch.ones(1, 48, 48, 1, dtype=dtype), offset_mask.to(dtype).view(1, 1, 1, -1)
        assert run(Tensors(*ones, torch.ones(1, 1, 1, 1, dtype=dtype)), p).output.item() == 2304

    def test_over_the_points_that_read_a_pixel(self, dtype, run):
        p = Parameters(kernel_size=(1, 1), padding=(0, 0), groups=1)
        rows, columns = torch.meshgrid(torch.arange(48), torch.arange(48), indexing="ij")
        to_origin = torch.stack((-columns, -rows, torch.ones(48, 48)), dim=-1)[None].to(dtype)
        image = torch.ones(1, 48, 48, 1, dtype=dtype)
        grad_value = run(Tensors(image, to_origin, image), p).grad_value
        assert grad_value[0, 0, 0, 0] == 2304
        assert grad_value.sum() == 2304

    def test_over_the_channels(self, dtype, run):
        p = Parameters(kernel_size=(1, 1), padding=(0, 0), groups=1)
        image = torch.ones(1, 1, 1, 2304, dtype=dtype)
        tensors = Tensors(image, torch.zeros(1, 1, 1, 3, dtype=dtype), image)
        assert run(tensors, p).grad_offset_mask[..., 2].item() == 2304


# Independence of batch, threads and memory layout


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "group_channels"), [((9, 7), 16), ((5, 11), 20), ((3, 1), 3)])
def test_image_in_a_batch_equals_the_image_alone(size, group_channels, dtype):
    p = Parameters(groups=3)
    tensors = random_tensors(p, batch=5, size=size, group_channels=group_channels).to(dtype)
    together = run_operator(tensors, p)
    for i in range(5):
        alone = run_operator(Tensors(*(t[i : i + 1] for t in tensors)), p)
        assert_equal(Result(*(t[i : i + 1] for t in together)), alone)


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_number_of_threads_changes_nothing(dtype):
    p = Parameters(groups=3)
    tensors = random_tensors(p, batch=3, size=(13, 17), group_channels=16).to(dtype)
    torch.set_num_threads(1)
    expected = run_operator(tensors, p)
    for threads in (2, 3, 5, 8):
        torch.set_num_threads(threads)
        assert_equal(run_operator(tensors, p), expected)


@backends
def test_memory_layout_changes_nothing(run):
    p = Parameters()
    tensors = random_tensors(p)
    scattered = Tensors(
        tensors.value.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        torch.cat((tensors.offset_mask, tensors.offset_mask), dim=-1)[
            ..., : tensors.offset_mask.shape[-1]
        ],
        tensors.grad_output.transpose(0, 1).contiguous().transpose(0, 1),
    )
    assert not any(t.is_contiguous() for t in scattered)
    assert_equal(run(scattered, p), run(tensors, p))


@backends
def test_empty_batch(run):
    p = Parameters()
    result = run(random_tensors(p, batch=0), p)
    assert [tuple(t.shape) for t in result] == [(0, 7, 6, 10), (0, 7, 6, 10), (0, 7, 6, 57)]


@pytest.mark.parametrize("which", [0, 1])
def test_only_the_gradient_asked_for_is_returned(which):
    p = Parameters()
    tensors = random_tensors(p)
    inputs = list(tensors[:2])
    inputs[which] = inputs[which].requires_grad_()
    dcnv4(*inputs, *p).backward(tensors.grad_output)
    assert inputs[1 - which].grad is None
    expected = run_operator(tensors, p)[1 + which]
    torch.testing.assert_close(inputs[which].grad, expected, rtol=0, atol=0)


# Points outside the image, and numbers that are not finite

TAP = 4  # of the first group of Parameters()
X, Y, MODULATION = 2 * TAP, 2 * TAP + 1, 18 + TAP


def assert_tap_contributes_nothing(tensors: Tensors, p: Parameters, run, assert_near) -> None:
    """The result is that of zero modulation, and the tap's own gradients are zero."""
    switched_off = tensors.offset_mask.clone()
    switched_off[..., [X, Y, MODULATION]] = 0
    result, expected = run(tensors, p), run(tensors._replace(offset_mask=switched_off), p)
    assert not result.grad_offset_mask[..., [X, Y, MODULATION]].any()
    expected.grad_offset_mask[..., MODULATION] = 0
    for actual, wanted in zip(result, expected, strict=True):
        assert_near(actual, wanted, 1e-5)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("offset", [1e30, -1e30, 1e4, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("channel", [X, Y])
def test_a_point_nowhere_in_the_image_contributes_nothing(channel, offset, dtype, run, assert_near):
    p = Parameters()
    tensors = random_tensors(p).to(dtype)
    tensors.offset_mask[..., channel] = offset
    assert_tap_contributes_nothing(tensors, p, run, assert_near)


@backends
@pytest.mark.parametrize("modulation", [math.inf, math.nan])
def test_a_point_outside_the_image_hides_its_modulation(modulation, run, assert_near):
    p = Parameters()
    tensors = random_tensors(p)
    tensors.offset_mask[..., X], tensors.offset_mask[..., MODULATION] = 100, modulation
    assert_tap_contributes_nothing(tensors, p, run, assert_near)


@backends
@pytest.mark.parametrize("infinite", [math.inf, math.nan])
def test_a_point_outside_the_image_hides_its_output_gradient(infinite, run, assert_near):
    p = Parameters(kernel_size=(1, 1), padding=(0, 0))
    tensors = random_tensors(p)
    tensors.offset_mask[:, 2, 3, :6] = 100
    expected = run(tensors, p)
    tensors.grad_output[:, 2, 3] = infinite
    for actual, wanted in zip(run(tensors, p), expected, strict=True):
        assert_near(actual, wanted, 1e-12)


@backends
@pytest.mark.parametrize("infinite", [math.inf, math.nan])
def test_a_pixel_is_read_only_by_points_in_its_cells(infinite, run):
    p = Parameters(kernel_size=(1, 1), padding=(0, 0))
    tensors = random_tensors(p)
    tensors.offset_mask[..., [0, 1, 3, 4]] = 0.5  # output (r, c) reads rows r, r+1, columns c, c+1
    tensors.offset_mask[:, 3, 3, 0] = -100
    tensors.value[:, 0, 0] = 0
    expected = run(tensors, p)
    tensors.value[:, 0, 0] = infinite
    result = run(tensors, p)
    assert not result.output[:, 0, 0].isfinite().any()
    assert not result.grad_offset_mask[:, 0, 0, :6].isfinite().any()
    result.output[:, 0, 0] = expected.output[:, 0, 0]
    result.grad_offset_mask[:, 0, 0] = expected.grad_offset_mask[:, 0, 0]
    assert_equal(result, expected)


# Errors

VALUE, OFFSET_MASK = torch.zeros(2, 5, 6, 8), torch.zeros(2, 5, 6, 56)
ERRORS = [
    ({"value": [1.0]}, TypeError, "value must be a tensor"),
    ({"offset_mask": None}, TypeError, "offset_mask must be a tensor"),
    ({"value": VALUE[0]}, ValueError, "value must be .N, H, W, C.*5, 6, 8"),
    ({"offset_mask": OFFSET_MASK[0]}, ValueError, "offset_mask must be .N, H, W, C"),
    ({"value": VALUE.int()}, TypeError, "value must be floating point"),
    ({"offset_mask": OFFSET_MASK.int()}, TypeError, "offset_mask must be floating point"),
    ({"value": VALUE.to(torch.complex64)}, TypeError, "value must be floating point"),
    ({"offset_mask": OFFSET_MASK.to("meta")}, ValueError, "value and offset_mask.*one device"),
    ({"offset_mask": OFFSET_MASK.double()}, TypeError, "value and offset_mask.*one dtype"),
    (
        {"value": VALUE.to("meta"), "offset_mask": OFFSET_MASK.double().to("meta")},
        TypeError,
        "value and offset_mask.*one dtype",
    ),
    ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1, got 0"),
    ({"stride": (1, 0)}, ValueError, "stride must be at least 1"),
    ({"padding": -1}, ValueError, "padding must be at least 0"),
    ({"dilation": 0}, ValueError, "dilation must be at least 1"),
    ({"kernel_size": 3.0}, TypeError, "kernel_size must be an int or a pair"),
    ({"stride": (1, 2, 3)}, TypeError, "stride must be an int or a pair"),
    ({"padding": "same"}, TypeError, "padding must be an int or a pair"),
    ({"dilation": None}, TypeError, "dilation must be an int or a pair"),
    ({"groups": 2.0}, TypeError, "groups must be an int"),
    ({"groups": 0}, ValueError, "groups must be positive"),
    ({"groups": 3}, ValueError, r"groups must .* divide the channels of value \(8\), got 3"),
    ({"kernel_size": 9}, ValueError, "output would be -1 x 0.*kernel_size"),
    ({"value": VALUE[:1]}, ValueError, r"offset_mask must be \(1, 5, 6"),
    ({"stride": 2}, ValueError, r"offset_mask must be \(2, 3, 3"),
    ({"offset_mask": OFFSET_MASK[..., :53]}, ValueError, "offset_mask .*at least 54 channels"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_wrong_argument_is_named(change, error, message):
    arguments = {"value": VALUE, "offset_mask": OFFSET_MASK, "groups": 2} | change
    with pytest.raises(error, match=message):
        dcnv4(**arguments)


SCHEMA_ORDER = ("value", "offset_mask", *Parameters._fields)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"value": VALUE[0]}, ValueError, "4 dimensions"),
        ({"offset_mask": OFFSET_MASK[:1]}, ValueError, "batch sizes"),
        ({"offset_mask": OFFSET_MASK.double()}, TypeError, "dtypes"),
        ({"value": VALUE.int(), "offset_mask": OFFSET_MASK.int()}, TypeError, "floating-point"),
        ({"groups": 3}, ValueError, "groups"),
        ({"offset_mask": OFFSET_MASK[..., :53]}, ValueError, "too few channels"),
        ({"kernel_size": (0, 3)}, ValueError, "kernel_size must be positive"),
        ({"stride": (2**40, 1)}, ValueError, "stride is too large"),
    ],
)
def test_kernels_refuse_what_would_lead_outside_their_tensors(change, error, message):
    arguments = Parameters()._asdict() | {"value": VALUE, "offset_mask": OFFSET_MASK} | change
    positional = [arguments[name] for name in SCHEMA_ORDER]
    with pytest.raises(error, match=message):
        torch.ops.ops_dcnv4.dcnv4(*positional)
    with pytest.raises(error, match=message):
        torch.ops.ops_dcnv4.dcnv4_backward(VALUE.to(positional[0].dtype), *positional)


@pytest.mark.parametrize("grad_output", [VALUE[:, 1:], VALUE.double()])
def test_backward_kernel_refuses_a_gradient_unlike_the_output(grad_output):
    with pytest.raises(ValueError, match="grad_output"):
        torch.ops.ops_dcnv4.dcnv4_backward(grad_output, VALUE, OFFSET_MASK, *Parameters())


# In a process of its own, where a crash is a failure and no more.
UNSAFE = """
import torch, ops_dcnv4
value, offset_mask = torch.zeros(1, 5, 5, 4), torch.zeros(1, 5, 5, 27)
ones = [[1, 1]] * 4
half_pairs = [[*ones[:i], [1], *ones[i + 1 :]] for i in range(4)]
overflowing_taps = [[[2**16, 2**16], *ones[1:]]]
for pairs in half_pairs + overflowing_taps:
    try:
        torch.ops.ops_dcnv4.dcnv4(value, offset_mask, *pairs, 1, 1.0, False)
    except ValueError:
        continue
    raise SystemExit(f"accepted {pairs}")
"""


def test_kernels_survive_half_a_pair_and_overflow():
    subprocess.run([sys.executable, "-c", UNSAFE], check=True)


def test_second_derivative_is_refused():
    value, offset_mask, _ = random_tensors(Parameters())
    output = dcnv4(value.requires_grad_(), offset_mask, *Parameters())
    (grad,) = torch.autograd.grad(output.sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


# torch.library, torch.compile, export, autocast


@varied
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration(p, dtype):
    value, offset_mask, grad_output = random_tensors(p, size=(5, 6)).to(dtype)
    namespace = torch.ops.ops_dcnv4
    torch.library.opcheck(namespace.dcnv4_backward.default, (grad_output, value, offset_mask, *p))
    inputs = value.requires_grad_(), offset_mask.requires_grad_()
    torch.library.opcheck(namespace.dcnv4.default, (*inputs, *p))


def between_other_operators(value: Tensor, offset_mask: Tensor, *parameters) -> Tensor:
    return dcnv4(value.tanh(), offset_mask * 0.5, *parameters)


def assert_compiled_equals_eager(compiled, size, assert_near) -> None:
    p = Parameters(stride=(2, 1))
    *inputs, grad_output = random_tensors(p, size=size)
    inputs = [t.requires_grad_() for t in inputs]
    outputs = [function(*inputs, *p) for function in (compiled, between_other_operators)]
    assert_near(outputs[0], outputs[1].detach(), 1e-12)
    grads = [torch.autograd.grad(output, inputs, grad_output) for output in outputs]
    for actual, expected in zip(*grads, strict=True):
        assert_near(actual, expected, 1e-12)


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_equals_eager(dynamic, assert_near):
    torch._dynamo.reset()
    compiled = torch.compile(
        between_other_operators, fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    assert_compiled_equals_eager(compiled, (7, 6), assert_near)
    assert_compiled_equals_eager(compiled, (8, 9), assert_near)


def test_torch_compile_with_inductor_equals_eager(assert_near):
    torch._dynamo.reset()
    quick = {"cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False}
    compiled = torch.compile(between_other_operators, fullgraph=True, options=quick)
    assert_compiled_equals_eager(compiled, (7, 6), assert_near)


def test_torch_compile_under_autocast():
    p = Parameters()
    value, offset_mask, _ = random_tensors(p).to(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(dcnv4, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = compiled(value, offset_mask, *p), dcnv4(value, offset_mask, *p)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_exports_with_dynamic_batch_and_image_size():
    p = Parameters()

    class Layer(torch.nn.Module):
        def forward(self, value, offset_mask):
            return dcnv4(value, offset_mask, *p)

    dims = dict(enumerate(torch.export.dims("n", "h", "w")))
    inputs = random_tensors(p)[:2]
    program = torch.export.export(Layer(), inputs, dynamic_shapes=(dims, dims))
    others = random_tensors(p, batch=3, size=(4, 11))[:2]
    torch.testing.assert_close(program.module()(*others), dcnv4(*others, *p), rtol=0, atol=0)


def test_meta_tensors_get_the_shapes():
    p = Parameters(kernel_size=(2, 3), stride=(2, 1), padding=(0, 2))
    tensors = random_tensors(p)
    result = run_operator(tensors.to("meta"), p)
    expected = (tensors.grad_output, tensors.value, tensors.offset_mask)
    assert all(t.is_meta for t in result)
    assert [t.shape for t in result] == [t.shape for t in expected]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_inputs(dtype):
    p = Parameters()
    value, offset_mask, grad_output = random_tensors(p).to(torch.float32)
    inputs = value.requires_grad_(), offset_mask.to(torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", dtype):
        output = dcnv4(*inputs, *p)
    grads = torch.autograd.grad(output, inputs, grad_output.to(dtype))
    in_dtype = run_operator(Tensors(*inputs, grad_output).to(dtype), p)
    expected = Result(
        in_dtype.output, in_dtype.grad_value.float(), in_dtype.grad_offset_mask.bfloat16()
    )
    assert_equal(Result(output.detach(), *grads), expected)


def test_autocast_leaves_float64_alone():
    value, offset_mask, _ = random_tensors(Parameters())
    with torch.autocast("cpu", torch.bfloat16):
        output = dcnv4(value, offset_mask, *Parameters())
    expected = dcnv4(value, offset_mask, *Parameters())
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


# Without the compiled library

WITHOUT_LIBRARY = """
import sys, warnings
sys.modules["ops_dcnv4._C"] = None
import torch, ops_dcnv4
assert not ops_dcnv4.is_compiled()
value, offset_mask, grad_output, parameters = torch.load(sys.argv[1])
inputs = value.requires_grad_(), offset_mask.requires_grad_()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        output = ops_dcnv4.dcnv4(*inputs, *parameters)
        grads = torch.autograd.grad(output, inputs, grad_output)
torch.save((output.detach(), *grads, [str(w.message) for w in caught]), sys.argv[2])
"""


def test_without_the_compiled_library(tmp_path, assert_near):
    p = Parameters(stride=(2, 1))
    tensors = random_tensors(p)
    torch.save((*tensors, tuple(p)), tmp_path / "inputs")
    script = [sys.executable, "-c", WITHOUT_LIBRARY, tmp_path / "inputs", tmp_path / "outputs"]
    subprocess.run(script, check=True)
    *result, messages = torch.load(tmp_path / "outputs")
    for actual, expected in zip(result, run_operator(tensors, p), strict=True):
        assert_near(actual, expected, 1e-12)
    (message,) = messages
    assert "slow PyTorch reference" in message
    assert "pip install --no-build-isolation" in message
