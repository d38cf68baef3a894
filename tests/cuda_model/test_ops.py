"""Tests of the CUDA kernels of DCNv4 on the serial CUDA emulator."""

import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.cuda_model import run_guarded
from tests.cuda_model.build import AVAILABLE, ROOT, load_operators
from tests.ops_dcnv4.cases import (
    DTYPES,
    Parameters,
    Run,
    Tensors,
    assert_equal,
    assert_rounded_once,
    random_tensors,
    run_exactly,
)
from tests.ops_dcnv4.test_ops import *  # noqa: F403  tests for every backend

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Linux and g++")

OPERATORS = tuple(
    name + suffix
    for name in ("dcnv4", "ms_deform_attn", "flash_deform_attn")
    for suffix in ("", "_backward")
)
FORWARD, REVERSE, SHUFFLED = 0, -1, 1


def kernels_for_the_cpu() -> str:
    return "".join(torch._C._dispatch_dump(f"ops_dcnv4::{name}") for name in OPERATORS)


@pytest.fixture(scope="module", autouse=True)
def _cuda_kernels() -> Iterator[None]:
    """Replace the CPU kernels by the emulated CUDA kernels, with threads in random order."""
    load_operators()
    threads, compiled = torch.get_num_threads(), kernels_for_the_cpu()
    torch.set_num_threads(1)
    library = torch.library.Library("ops_dcnv4", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        for name in OPERATORS:
            kernel = getattr(torch.ops.ops_dcnv4_cuda_model, name).default
            library.impl(name, kernel, "CPU", allow_override=True)
    assert kernels_for_the_cpu() != compiled
    torch.ops.ops_dcnv4_cuda_model.set_order(SHUFFLED)
    yield
    torch.ops.ops_dcnv4_cuda_model.set_order(FORWARD)
    library._destroy()
    assert kernels_for_the_cpu() == compiled
    torch.set_num_threads(threads)


# Paths through the kernels. tests/gpu imports these tests and runs them on larger images.


@pytest.fixture(scope="module")
def image_size() -> tuple[int, int]:
    return 5, 6


def interpolates_in_16_bits(tensors: Tensors, p: Parameters) -> bool:
    value = tensors.value
    is_16_bit = value.dtype in (torch.float16, torch.bfloat16)
    return is_16_bit and value.shape[-1] // p.groups % 2 == 0 and value.data_ptr() % 4 == 0


def magnitudes(tensors: Tensors, p: Parameters) -> Tensors:
    """Return the tensors with positive modulation and value, so that no terms cancel."""
    packed = tensors.offset_mask[..., : 3 * p.groups * p.taps].unflatten(-1, (p.groups, -1)).clone()
    packed[..., 2 * p.taps :].abs_()
    return Tensors(tensors.value.abs(), packed.flatten(-2), tensors.grad_output)


def assert_interpolated_in_16_bits(output: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    """Check the error bound of interpolation in 16 bits.

    Each pixel passes through five roundings: its weight and the sums that include it. Each adds an
    error of up to half an ulp or, for subnormals, half the smallest number. The errors add up over
    the taps, and the output is rounded once more.

    Args:
        output: The output, in its dtype.
        exact: The output, computed in float64.
        magnitude: The output of inputs whose terms do not cancel.
    """
    ulp = torch.finfo(output.dtype).eps / 2
    error = (output.double() - exact).abs()
    assert (error <= 5.1 * ulp * magnitude + 1.1 * ulp * exact.abs() + 2e-5).all()


def assert_documented_accuracy(run: Run, tensors: Tensors, p: Parameters) -> None:
    actual, exact = run(tensors, p), run_exactly(tensors.to("cpu"), p)
    assert {t.dtype for t in actual} == {tensors.value.dtype}
    if interpolates_in_16_bits(tensors, p):
        magnitude = run_exactly(magnitudes(tensors.to("cpu"), p), p).output
        assert_interpolated_in_16_bits(actual.output, exact.output, magnitude)
        actual, exact = actual[1:], exact[1:]
    for a, e in zip(actual, exact, strict=True):
        assert_rounded_once(a, e)


@pytest.mark.parametrize("remove_center", [False, True])
@pytest.mark.parametrize("group_channels", [16, 32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sizes_with_specialized_kernels(dtype, group_channels, remove_center, image_size, run):
    p = Parameters(groups=3, remove_center=remove_center)
    tensors = random_tensors(p, 2, image_size, group_channels, steps_per_pixel=64).to(dtype)
    assert_documented_accuracy(run, tensors, p)


# For images in which whole warps sample no pixel outside, and the kernels need no checks.
INSIDE = [
    Parameters(),
    Parameters(remove_center=True, stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    Parameters(groups=3, stride=(1, 2), padding=(0, 0), offset_scale=0.5),
]


@pytest.mark.parametrize("p", INSIDE)
@pytest.mark.parametrize("group_channels", [16, 32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_windows_inside_of_the_image(dtype, group_channels, p, run):
    size = [12 * stride for stride in p.stride]
    tensors = random_tensors(p, 1, size, group_channels, spread=0.25, steps_per_pixel=64).to(dtype)
    assert_documented_accuracy(run, tensors, p)


# Each combination of channels per thread, threads per unit, and threads without channels.
WIDTHS = {
    torch.float32: (3, 6, 12, 100),
    torch.float16: (5, 6, 12, 40),
    torch.bfloat16: (4, 10, 24),
}


@pytest.mark.parametrize("p", [*INSIDE, Parameters(groups=3, offset_scale=2.0)])
@pytest.mark.parametrize(
    ("dtype", "group_channels"), [(dtype, width) for dtype in WIDTHS for width in WIDTHS[dtype]]
)
def test_other_group_widths(dtype, group_channels, p, run):
    size = [12 * stride for stride in p.stride]
    tensors = random_tensors(p, 1, size, group_channels, spread=0.25, steps_per_pixel=64).to(dtype)
    assert_documented_accuracy(run, tensors, p)


OTHER_SIZES = [
    (Parameters(groups=5), 8),
    (Parameters(groups=33), 4),
    (Parameters(groups=7, kernel_size=(1, 1), padding=(0, 0)), 24),
    (Parameters(groups=2, stride=(2, 2), offset_scale=0.5), 40),
    (Parameters(groups=2, kernel_size=(7, 7), padding=(3, 3)), 16),
    (Parameters(groups=3, kernel_size=(2, 3), padding=(1, 1)), 20),
    (Parameters(groups=3, kernel_size=(5, 2), padding=(2, 1), remove_center=True), 64),
    (Parameters(groups=1, dilation=(2, 1)), 130),
    (Parameters(groups=1), 512),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("p", "group_channels"), OTHER_SIZES)
def test_other_sizes(p, group_channels, dtype, image_size, run):
    tensors = random_tensors(p, 1, image_size, group_channels, steps_per_pixel=64).to(dtype)
    assert_documented_accuracy(run, tensors, p)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (4, 4), (3, 5)])
@pytest.mark.parametrize(("groups", "group_channels"), [(1, 16), (3, 64), (9, 3)])
def test_images_that_partially_fill_a_block(groups, group_channels, size, run):
    p = Parameters(groups=groups, padding=(2, 2))
    tensors = random_tensors(p, 2, size, group_channels, steps_per_pixel=64).to(torch.float32)
    assert_documented_accuracy(run, tensors, p)


def unaligned(tensor: Tensor) -> Tensor:
    """Return a copy that begins one element into its memory."""
    memory = tensor.new_empty(tensor.numel() + 1)
    return memory[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", Tensors._fields)
def test_unaligned_memory(name, dtype, run, device):
    p = Parameters()
    tensors = random_tensors(p, group_channels=16, steps_per_pixel=64).to(dtype).to(device)
    tensors = tensors._replace(**{name: unaligned(getattr(tensors, name))})
    assert getattr(tensors, name).data_ptr() % 16 != 0
    assert_documented_accuracy(run, tensors, p)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("dtype", "share"), [(torch.float16, 0.998), (torch.bfloat16, 0.984)])
def test_values_up_to_the_documented_share_of_the_maximum_do_not_overflow(dtype, share, sign, run):
    p = Parameters(groups=1)
    tensors = random_tensors(p, group_channels=16).to(dtype)
    tensors.value.fill_(sign * share * torch.finfo(dtype).max)
    tensors.offset_mask[..., 2 * p.taps :] = 1 / 16
    assert run(tensors, p).output.isfinite().all()


def relative_errors(run: Run, dtype: torch.dtype) -> tuple[float, float]:
    """Return the errors of the operator, and of rounding its float64 output once.

    Both are root mean squares, relative to that of the output, in multiples of epsilon.
    """
    p = Parameters(groups=4)
    tensors = random_tensors(p, 1, (16, 16), 16).to(dtype)
    exact = run_exactly(tensors, p).output
    unit = torch.finfo(dtype).eps * exact.square().mean().sqrt()
    outputs = run(tensors, p).output, exact.to(dtype)
    errors = [((output.double() - exact).square().mean().sqrt() / unit) for output in outputs]
    return errors[0].item(), errors[1].item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_interpolation_in_16_bits_has_twice_the_error_of_rounding_the_output(dtype, run):
    error, rounding = relative_errors(run, dtype)
    assert error < 2.3 * rounding < 0.5


def test_more_images_than_the_grid_limit(run):
    p = Parameters(groups=1, kernel_size=(1, 1), padding=(0, 0))
    tensors = random_tensors(p, 65537, (1, 1), 1, padding_channels=0).to(torch.float32)
    assert_documented_accuracy(run, tensors, p)


# Order of threads


@pytest.fixture
def set_order() -> Iterator[Callable[[int], None]]:
    yield torch.ops.ops_dcnv4_cuda_model.set_order
    torch.ops.ops_dcnv4_cuda_model.set_order(SHUFFLED)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_channels", [3, 16])
def test_deterministic_results_do_not_depend_on_the_order(group_channels, dtype, run, set_order):
    p = Parameters(groups=5)
    tensors = random_tensors(p, group_channels=group_channels).to(dtype)
    expected = run(tensors, p)
    for order in (FORWARD, REVERSE):
        set_order(order)
        assert_equal(run(tensors, p), expected)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (9, 8)])  # for one warp and for several
def test_sums_in_a_fixed_order(size, run):
    p = Parameters(groups=5, kernel_size=(2, 3), padding=(1, 1))
    tensors = random_tensors(p, 2, size, 3, steps_per_pixel=64).to(torch.float32)
    assert_documented_accuracy(run, tensors, p)


@pytest.mark.parametrize("group_channels", [3, 16])
def test_order_changes_only_the_rounding_of_atomic_sums(
    group_channels, run, set_order, assert_near
):
    p = Parameters(groups=5)
    tensors = random_tensors(p, group_channels=group_channels).to(torch.float32)
    results = []
    for order in (FORWARD, REVERSE):
        set_order(order)
        results.append(run(tensors, p))
    first, second = results
    assert not first.grad_value.equal(second.grad_value)
    assert_near(first.grad_value, second.grad_value, 1e-6)
    assert_equal(first._replace(grad_value=second.grad_value), second)


# Accesses outside of tensors


@pytest.mark.parametrize("where", ["before", "after"])
def test_no_access_outside_of_tensors(where):
    command = [sys.executable, "-m", "tests.cuda_model.run_guarded", where]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.stdout.splitlines()[-1:] == [run_guarded.LAST], process.stderr
    assert process.returncode == -signal.SIGSEGV
