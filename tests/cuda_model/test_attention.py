"""The CUDA kernels of deformable attention, run by the serial model of CUDA's execution."""

import functools
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.cuda_model.attention_cases import (
    DTYPE_PAIRS,
    Result,
    Tensors,
    outside_of_value,
    random_tensors,
    run_exactly,
    run_operators,
)
from tests.cuda_model.build import AVAILABLE, ROOT, load_operators
from tests.cuda_model.test_ops import FORWARD, REVERSE, SHUFFLED, unaligned
from tests.ops_dcnv4.cases import assert_equal, assert_rounded_once

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Linux and g++")

Run = Callable[[Tensors], Result]
dtype_pairs = pytest.mark.parametrize(("dtype", "points_dtype"), DTYPE_PAIRS)


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Runs both forms of the operator, the threads of their kernels in a random order."""
    load_operators()
    operators, threads = torch.ops.ops_dcnv4_cuda_model, torch.get_num_threads()
    torch.set_num_threads(1)
    operators.set_order(SHUFFLED)
    yield functools.partial(run_operators, operators)
    operators.set_order(FORWARD)
    torch.set_num_threads(threads)


# The tests of a GPU import what follows, up to the order of threads.


def interpolates_in_halves(tensors: Tensors) -> bool:
    value = tensors.value
    return value.dtype == torch.float16 and value.shape[3] % 8 == 0 and value.data_ptr() % 16 == 0


def assert_interpolated_in_halves(output: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    """As for DCNv4, whose test explains the bound."""
    ulp = torch.finfo(torch.float16).eps / 2
    error = (output.double() - exact).abs()
    assert (error <= 5.1 * ulp * magnitude + 1.1 * ulp * exact.abs() + 2e-5).all()


def magnitudes(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Outputs of both forms with value and weights positive, for which nothing cancels out."""
    positive = tensors._replace(value=tensors.value.abs())
    fused_output = run_exactly(positive).fused_output
    positive = positive._replace(attention_weights=tensors.attention_weights.abs())
    return run_exactly(positive).output, fused_output


def assert_as_exact_as_promised(run: Run, tensors: Tensors) -> None:
    actual = Result(*(t.cpu() for t in run(tensors)))
    in_halves, dtypes = interpolates_in_halves(tensors), [t.dtype for t in tensors]
    tensors = tensors.to("cpu")
    exact = run_exactly(tensors)
    assert [t.dtype for t in actual] == [dtypes[0]] * 4 + [dtypes[3]] * 3
    if in_halves:
        outputs = zip(actual[:2], exact[:2], magnitudes(tensors), strict=True)
        for output, expected, magnitude in outputs:
            assert_interpolated_in_halves(output, expected, magnitude)
        actual, exact = actual[2:], exact[2:]
    for a, e in zip(actual, exact, strict=True):
        assert_rounded_once(a, e)


GOLDENS = sorted((ROOT / "tests" / "data" / "msda").glob("*.npz"))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_published_operator(path, dtype, tolerance, run, device, assert_near):
    golden = {name: torch.from_numpy(array) for name, array in np.load(path).items()}
    tensors = Tensors(*(golden[name] for name in Tensors._fields)).astype(dtype)
    split = run(tensors.to(device))
    fused = run(tensors._replace(attention_weights=golden["attention_logits"].to(dtype)).to(device))
    for actual, name in (
        (split.output, "output"),
        (split.grad_value, "grad_value"),
        (split.grad_locations, "grad_sampling_locations"),
        (split.grad_weights, "grad_attention_weights"),
        (fused.fused_output, "output"),
        (fused.fused_grad_value, "grad_value"),
        (fused.grad_packed, "grad_sampling_loc_attn"),
    ):
        assert_near(actual.cpu(), golden[name], tolerance)


@pytest.mark.parametrize("head_channels", [16, 32, 64])
@dtype_pairs
def test_sizes_that_kernels_are_compiled_for(dtype, points_dtype, head_channels, run, device):
    tensors = random_tensors(3, head_channels, points=4).astype(dtype, points_dtype)
    assert_as_exact_as_promised(run, tensors.to(device))


OTHER_SIZES = [
    {"heads": 5, "head_channels": 8},
    {"heads": 33, "head_channels": 4, "queries": 3},
    {"heads": 7, "head_channels": 24, "points": 1, "sizes": ((4, 4),)},
    {"heads": 2, "head_channels": 40, "points": 8, "sizes": ((8, 8), (2, 4))},
    {"heads": 2, "head_channels": 32, "points": 8, "sizes": ((8, 8), (2, 4))},
    {"heads": 1, "head_channels": 130, "points": 2},
    {"heads": 1, "head_channels": 512, "queries": 2},
    {"heads": 1, "head_channels": 3, "points": 5, "sizes": ((1, 1),) * 33, "queries": 2},
]


@pytest.mark.parametrize("sizes", OTHER_SIZES)
@dtype_pairs
def test_other_sizes(dtype, points_dtype, sizes, run, device):
    assert_as_exact_as_promised(run, random_tensors(**sizes).astype(dtype, points_dtype).to(device))


@pytest.mark.parametrize("queries", [1, 15, 16, 33])
@pytest.mark.parametrize(("heads", "head_channels"), [(1, 16), (3, 64), (9, 3)])
def test_queries_that_fill_no_block(heads, head_channels, queries, run, device):
    tensors = random_tensors(heads, head_channels, points=4, queries=queries, batch=2)
    assert_as_exact_as_promised(run, tensors.astype(torch.float32).to(device))


@pytest.mark.parametrize("name", ["value", "sampling_locations", "attention_weights"])
@dtype_pairs
def test_unaligned_memory(name, dtype, points_dtype, run, device):
    tensors = random_tensors(head_channels=16, points=4).astype(dtype, points_dtype).to(device)
    tensors = tensors._replace(**{name: unaligned(getattr(tensors, name))})
    assert getattr(tensors, name).data_ptr() % 16 != 0
    assert_as_exact_as_promised(run, tensors)


@pytest.mark.usefixtures("deterministic")
@dtype_pairs
def test_image_in_a_batch_equals_the_image_alone(dtype, points_dtype, run, device):
    tensors = random_tensors(3, 16, points=4, batch=3).astype(dtype, points_dtype).to(device)
    together = run(tensors)
    for i in range(3):
        alone = run(tensors.images(i, i + 1))
        assert_equal(Result(*(t[i : i + 1] for t in together)), alone)


@pytest.mark.usefixtures("deterministic")
def test_fixed_order_gives_the_same_gradients(run, device):
    assert_as_exact_as_promised(run, random_tensors(5, 16, points=4).to(device))
    assert_as_exact_as_promised(run, random_tensors(2, 33, points=1, batch=2).to(device))


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"queries": 0}, {"heads": 0}])
def test_nothing_to_do(sizes, run, device):
    result = run(random_tensors(**sizes).to(device))
    expected = run_exactly(random_tensors(**sizes)) if "heads" not in sizes else result
    assert [t.shape for t in result] == [t.shape for t in expected]
    assert not any(t.any() for t in result)


# 16 channels and 4 points of 4 levels: a compiled size.
dtypes_and_sizes = pytest.mark.parametrize(
    ("dtype", "head_channels", "points"), [(torch.float32, 5, 2), (torch.float16, 16, 4)]
)
LEVEL, POINT = 1, 0


@dtypes_and_sizes
@pytest.mark.parametrize("weight", [1.0, math.inf, math.nan])
@pytest.mark.parametrize("location", [1e30, -1e30, 2.0, -1.0, math.inf, -math.inf, math.nan])
def test_a_point_nowhere_in_the_image_contributes_nothing(
    location, weight, dtype, head_channels, points, run, device, assert_near
):
    tensors = random_tensors(2, head_channels, points).astype(dtype, torch.float32)
    off = tensors.attention_weights.clone()
    off[:, :, :, LEVEL, POINT] = 0
    expected = run_exactly(tensors._replace(attention_weights=off))
    tensors.sampling_locations[:, :, :, LEVEL, POINT, 0] = location
    tensors.attention_weights[:, :, :, LEVEL, POINT] = weight
    result = run(tensors.to(device))
    assert not result.grad_locations[:, :, :, LEVEL, POINT].any()
    assert not result.grad_weights[:, :, :, LEVEL, POINT].any()
    tolerance = 2e-3 if dtype == torch.float16 else 1e-5
    assert_near(result.output.cpu(), expected.output, tolerance)
    assert_near(result.grad_value.cpu(), expected.grad_value, tolerance)
    if math.isfinite(weight):
        fused = run_exactly(tensors)
        assert_near(result.grad_packed.cpu(), fused.grad_packed, tolerance)


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_large_logits_do_not_overflow(shift, run, device):
    tensors = random_tensors(2, 16, points=4).astype(torch.float32)
    expected = run(tensors.to(device))
    result = run(tensors._replace(attention_weights=tensors.attention_weights + shift).to(device))
    torch.testing.assert_close(result.fused_output, expected.fused_output, rtol=0, atol=5e-3)


# The order of threads, and what only the model can show.


@pytest.mark.parametrize("form", ["ms_deform_attn", "flash_deform_attn"])
@pytest.mark.parametrize("head_channels", [5, 16])
def test_a_level_outside_of_value_is_an_error(head_channels, form, run):
    tensors = random_tensors(head_channels=head_channels, points=4).astype(torch.float32)
    points = tensors[3:5] if form == "ms_deform_attn" else tensors.packed
    operators = torch.ops.ops_dcnv4_cuda_model
    for levels in outside_of_value():
        arguments = tensors.value, *levels, *points
        with pytest.raises(RuntimeError, match="lies outside of value"):
            getattr(operators, form)(*arguments)
        with pytest.raises(RuntimeError, match="lies outside of value"):
            getattr(operators, f"{form}_backward")(tensors.grad_output, *arguments)


@pytest.fixture
def set_order(run) -> Iterator[Callable[[int], None]]:
    yield torch.ops.ops_dcnv4_cuda_model.set_order
    torch.ops.ops_dcnv4_cuda_model.set_order(SHUFFLED)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("head_channels", [3, 16])
@dtype_pairs
def test_order_changes_no_bit_of_deterministic_results(
    dtype, points_dtype, head_channels, run, set_order
):
    tensors = random_tensors(5, head_channels, points=4).astype(dtype, points_dtype)
    results = []
    for order in (FORWARD, REVERSE, 2):
        set_order(order)
        results.append(run(tensors))
    for result in results[1:]:
        assert_equal(result, results[0])


@pytest.mark.parametrize("head_channels", [3, 16])
def test_order_changes_rounding_only_where_threads_add_up(
    head_channels, run, set_order, assert_near
):
    tensors = random_tensors(5, head_channels, points=4).astype(torch.float32)
    results = []
    for order in (FORWARD, REVERSE):
        set_order(order)
        results.append(run(tensors))
    for name, first in results[0]._asdict().items():
        second = getattr(results[1], name)
        if name.endswith("grad_value"):
            assert not first.equal(second)
            assert_near(first, second, 1e-6)
        else:
            assert first.equal(second)
