"""Tests of the CUDA kernels of deformable attention on the serial CUDA emulator."""

import pytest
import torch
from torch import Tensor

from tests.cuda_model.attention_cases import DTYPE_PAIRS, FOUR_LEVELS, levels_outside_of_value
from tests.cuda_model.build import AVAILABLE
from tests.cuda_model.test_ops import (
    FORWARD,
    REVERSE,
    _cuda_kernels,  # noqa: F401  replaces the CPU kernels in this module
    assert_interpolated_in_16_bits,
    set_order,  # noqa: F401
    unaligned,
)
from tests.ops_dcnv4.attention_cases import (
    Inputs,
    Result,
    Run,
    pack,
    random_inputs,
    run_exactly,
)
from tests.ops_dcnv4.cases import assert_equal, assert_rounded_once
from tests.ops_dcnv4.test_attention import *  # noqa: F403  tests for every backend
from tests.ops_dcnv4.test_attention import both_forms, raw_operators

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Linux and g++")

dtype_pairs = pytest.mark.parametrize(("dtype", "points_dtype"), DTYPE_PAIRS)


# Paths through the kernels. tests/gpu imports these tests and runs them with more queries.


@pytest.fixture(scope="module")
def queries() -> int:
    return 17


def exact_inputs(dtype, points_dtype, **sizes) -> Inputs:
    return random_inputs(**{"steps": 64} | sizes).to(dtype, points_dtype)


def interpolates_in_16_bits(inputs: Inputs) -> bool:
    value = inputs.value
    is_16_bit = value.dtype in (torch.float16, torch.bfloat16)
    return is_16_bit and value.shape[3] % 2 == 0 and value.data_ptr() % 4 == 0


def magnitude(inputs: Inputs, form: str) -> Tensor:
    """Return the exact output for inputs whose terms do not cancel."""
    inputs = inputs._replace(value=inputs.value.abs())
    if form == "split":
        inputs = inputs._replace(weights=inputs.weights.abs())
    return run_exactly(inputs, form).output


def assert_documented_accuracy(run: Run, inputs: Inputs, form: str) -> None:
    actual, in_16_bits = run(inputs, form), interpolates_in_16_bits(inputs)
    inputs = inputs.on("cpu")
    exact = run_exactly(inputs, form)
    value, points = inputs.value.dtype, inputs.weights.dtype
    assert [t.dtype for t in actual] == [value, value, points, points]
    if in_16_bits:
        assert_interpolated_in_16_bits(actual.output, exact.output, magnitude(inputs, form))
        actual, exact = actual[1:], exact[1:]
    for a, e in zip(actual, exact, strict=True):
        assert_rounded_once(a, e)


@pytest.mark.parametrize("head_channels", [16, 32, 64])
@pytest.mark.parametrize(
    ("shapes", "points"), [(FOUR_LEVELS, 4), (((7, 9), (3, 4)), 8)], ids=["4x4", "2x8"]
)
@dtype_pairs
@both_forms
def test_sizes_with_specialized_kernels(
    form, dtype, points_dtype, shapes, points, head_channels, queries, run
):
    sizes = {"heads": 3, "head_channels": head_channels, "queries": queries, "batch": 1}
    inputs = exact_inputs(dtype, points_dtype, shapes=shapes, points=points, **sizes)
    assert_documented_accuracy(run, inputs, form)


OTHER_SIZES = [
    {"heads": 5, "head_channels": 8},
    {"heads": 33, "head_channels": 4},
    {"heads": 3, "head_channels": 6},
    {"heads": 7, "head_channels": 24, "points": 1, "shapes": ((4, 4),)},
    {"heads": 2, "head_channels": 40, "points": 8},
    {"heads": 1, "head_channels": 130, "points": 2},
    {"heads": 1, "head_channels": 512},
    {"heads": 1, "head_channels": 3, "points": 5, "shapes": ((1, 1),) * 33},
]


@pytest.mark.parametrize("sizes", OTHER_SIZES)
@dtype_pairs
@both_forms
def test_other_sizes(form, dtype, points_dtype, sizes, run):
    assert_documented_accuracy(run, exact_inputs(dtype, points_dtype, **sizes), form)


@pytest.mark.parametrize("count", [1, 15, 16, 33])
@pytest.mark.parametrize(("heads", "head_channels"), [(1, 16), (3, 64), (9, 3)])
def test_queries_that_partially_fill_a_block(heads, head_channels, count, run):
    sizes = {"heads": heads, "head_channels": head_channels, "queries": count, "points": 8}
    assert_documented_accuracy(run, exact_inputs(torch.float32, None, **sizes), "split")


@pytest.mark.parametrize("name", ["value", "locations", "weights", "grad_output"])
@dtype_pairs
def test_unaligned_memory(name, dtype, points_dtype, run, device):
    inputs = exact_inputs(dtype, points_dtype, head_channels=16, points=8).on(device)
    inputs = inputs._replace(**{name: unaligned(getattr(inputs, name))})
    assert getattr(inputs, name).data_ptr() % 16 != 0
    assert_documented_accuracy(run, inputs, "split")


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("head_channels", [16, 33])
@both_forms
def test_sums_in_a_fixed_order(form, head_channels, run):
    inputs = exact_inputs(torch.float64, None, head_channels=head_channels, heads=5, points=8)
    assert_documented_accuracy(run, inputs, form)


# Order of threads, and errors that would end the process on a GPU


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@both_forms
def test_a_level_outside_of_value_is_an_error(form, dtype):
    inputs = random_inputs(FOUR_LEVELS, points=4, head_channels=16).to(dtype)
    forward, backward = raw_operators(form)
    for shapes, starts in levels_outside_of_value():
        changed = inputs._replace(spatial_shapes=shapes, level_start_index=starts)
        arguments = *changed[:3], *(changed[3:5] if form == "split" else (pack(changed), 4))
        with pytest.raises(RuntimeError, match="must lie within value"):
            forward(*arguments)
        with pytest.raises(RuntimeError, match="must lie within value"):
            backward(inputs.grad_output, *arguments)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("head_channels", [3, 16])
@dtype_pairs
@both_forms
def test_deterministic_results_do_not_depend_on_the_order(
    form, dtype, points_dtype, head_channels, run, set_order  # noqa: F811
):  # fmt: skip
    inputs = random_inputs(head_channels=head_channels, points=8).to(dtype, points_dtype)
    results = []
    for order in (FORWARD, REVERSE, 2):
        set_order(order)
        results.append(run(inputs, form))
    for result in results[1:]:
        assert_equal(result, results[0])


@pytest.mark.parametrize("head_channels", [3, 16])
@both_forms
def test_order_changes_only_the_rounding_of_atomic_sums(
    form, head_channels, run, set_order, assert_near  # noqa: F811
):  # fmt: skip
    inputs = random_inputs(head_channels=head_channels, points=8, queries=17).to(torch.float32)
    results: list[Result] = []
    for order in (FORWARD, REVERSE):
        set_order(order)
        results.append(run(inputs, form))
    first, second = results
    assert not first.grad_value.equal(second.grad_value)
    assert_near(first.grad_value, second.grad_value, 1e-6)
    assert_equal(first._replace(grad_value=second.grad_value), second)
