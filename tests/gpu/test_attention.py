"""Tests of the CUDA kernels of deformable attention on a GPU: shared tests, memory, streams."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cuda_model.attention_cases import DTYPE_PAIRS
from tests.cuda_model.test_attention import (  # noqa: F401
    test_other_sizes,
    test_queries_that_partially_fill_a_block,
    test_sizes_with_specialized_kernels,
    test_sums_in_a_fixed_order,
    test_unaligned_memory,
)
from tests.gpu.test_ops import (
    GIB,
    assert_same_halves,
    poison_free_memory,
    replay,
    skip_without_memory,
)
from tests.ops_dcnv4.attention_cases import Inputs, Result, call, random_inputs, run_reference
from tests.ops_dcnv4.cases import assert_equal
from tests.ops_dcnv4.test_attention import *  # noqa: F403  tests for every backend
from tests.ops_dcnv4.test_attention import both_forms

dtype_pairs = pytest.mark.parametrize(("dtype", "points_dtype"), DTYPE_PAIRS)
LEVELS = ((25, 38), (13, 19), (7, 10), (4, 5))


@pytest.fixture(scope="module")
def queries() -> int:
    return 900


def compute(inputs: Inputs, form: str) -> Result:
    """Return output and gradients of tensors on the GPU, without copying them to the CPU."""
    leaves = [t.detach().requires_grad_() for t in (inputs.value, inputs.locations, inputs.weights)]
    value, locations, weights = leaves
    output = call(inputs._replace(value=value, locations=locations, weights=weights), form)
    return Result(output.detach(), *torch.autograd.grad(output, leaves, inputs.grad_output))


def encoder_inputs(dtype, points_dtype=None, **sizes) -> Inputs:
    sizes = {"points": 4, "heads": 8, "head_channels": 32, "queries": 300} | sizes
    return random_inputs(LEVELS, **sizes).to(dtype, points_dtype).on("cuda")


@pytest.mark.usefixtures("deterministic")
@dtype_pairs
@both_forms
def test_image_in_a_large_batch_equals_the_image_alone(form, dtype, points_dtype, run):
    inputs = encoder_inputs(dtype, points_dtype, batch=16, queries=37)
    together = run(inputs, form)
    for i in range(16):
        alone = run(inputs.of_image(i), form)
        assert_equal(Result(*(t[i : i + 1] for t in together)), alone)


@pytest.mark.usefixtures("deterministic")
@dtype_pairs
@both_forms
def test_deterministic_results_are_reproducible(form, dtype, points_dtype, run):
    inputs = encoder_inputs(dtype, points_dtype)
    expected = run(inputs, form)
    for _ in range(3):
        assert_equal(run(inputs, form), expected)


@pytest.mark.parametrize(("batch", "heads"), [(65537, 1), (1, 8 * 65535 + 5)])
def test_more_images_or_heads_than_the_grid_limit(batch, heads, run, assert_near):
    inputs = random_inputs(((1, 1),), 1, heads, 1, queries=1, batch=batch)
    results = run(inputs, "split"), run_reference(inputs, "split")
    for actual, expected in zip(*results, strict=True):
        assert_near(actual, expected, 1e-12)


# Sizes


def large_inputs(batch: int, length: int, queries: int) -> Inputs:
    """Draw float16 inputs on the GPU: one level of length x length pixels, 8 heads, 32 channels."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.float16)

    locations = normal(batch, queries, 8, 1, 4, 2).mul_(0.2).add_(0.5)
    return Inputs(
        normal(batch, length * length, 8, 32),
        torch.tensor([[length, length]], device="cuda"),
        torch.tensor([0], device="cuda"),
        locations,
        normal(batch, queries, 8, 1, 4),
        normal(batch, queries, 256),
    )


def test_a_batch_beyond_32_bit_indices():
    skip_without_memory(40 * GIB)
    inputs = large_inputs(batch=33, length=512, queries=1000)
    assert inputs.value.numel() > 2**31
    together = compute(inputs, "split")
    for i in (0, 32):
        alone = compute(inputs.of_image(i), "split")
        assert_same_halves(tuple(t[i : i + 1] for t in together), alone)


def test_an_image_beyond_32_bit_indices():
    skip_without_memory(40 * GIB)
    inputs = large_inputs(batch=1, length=2944, queries=1000)
    assert inputs.value.numel() > 2**31
    # The last rows are a separate level that contains all points.
    rows, length = 128, inputs.value.shape[1]
    shapes = torch.tensor([[1, length - rows * 2944], [rows, 2944]], device="cuda")
    start = torch.tensor([0, length - rows * 2944], device="cuda")
    points = inputs.locations.new_full((1, 1000, 8, 1, 4, 2), -1.0)
    whole = inputs._replace(
        spatial_shapes=shapes,
        level_start_index=start,
        locations=torch.cat((points, inputs.locations), dim=3),
        weights=inputs.weights.repeat(1, 1, 1, 2, 1),
    )
    end = inputs._replace(value=inputs.value[:, -rows * 2944 :], spatial_shapes=shapes[1:])
    whole, end = compute(whole, "split"), compute(end, "split")
    assert_same_halves(
        (whole.output, whole.grad_value[:, -rows * 2944 :]), (end.output, end.grad_value)
    )
    assert not whole.grad_value[:, : -rows * 2944].any()


# Memory and streams


@pytest.mark.parametrize("head_channels", [5, 32])
@dtype_pairs
@both_forms
def test_every_element_of_the_results_is_written(form, dtype, points_dtype, head_channels):
    inputs = encoder_inputs(dtype, points_dtype, head_channels=head_channels)
    poisoned = poison_free_memory()
    results = compute(inputs, form)
    assert any(result.data_ptr() in addresses for addresses in poisoned for result in results)
    assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize("levels", ["tensors", "lists"])
@both_forms
def test_calls_do_not_synchronize_with_the_gpu(form, levels):
    inputs = encoder_inputs(torch.float16, torch.float32)
    if levels == "lists":
        inputs = inputs._replace(spatial_shapes=list(LEVELS), level_start_index=None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        compute(inputs, form)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("deterministic")
@both_forms
def test_a_cuda_graph_can_be_replayed_with_other_inputs(form, run):
    example, *others = (encoder_inputs(torch.float16, seed=seed) for seed in range(3))
    results = replay(lambda inputs: compute(inputs, form), example, others)
    for result, other in zip(results, others, strict=True):
        assert_equal(result, run(other, form))


OUTSIDE = """
import torch
from ops_dcnv4 import ms_deform_attn
from tests.ops_dcnv4.attention_cases import random_inputs
value, shapes, starts, locations, weights, _ = random_inputs(points=4).on("cuda")
ms_deform_attn(value, shapes, starts + 1, locations, weights)
torch.cuda.synchronize()
"""


def test_a_level_outside_of_value_fails_an_assertion():
    """A failed assertion makes the GPU unusable for the process, so this starts another one."""
    process = subprocess.run(
        [sys.executable, "-c", OUTSIDE],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert process.returncode != 0
    assert "device-side assert" in process.stderr
    assert "must lie within value" in process.stderr + process.stdout
