"""Tests of the CUDA kernels on a GPU: shared tests, realistic sizes, memory and streams."""

import functools
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from ops_dcnv4 import dcnv4
from tests.cuda_model.test_ops import (  # noqa: F401
    test_images_that_partially_fill_a_block,
    test_more_images_than_the_grid_limit,
    test_other_sizes,
    test_sizes_with_specialized_kernels,
    test_unaligned_memory,
    test_values_up_to_the_documented_share_of_the_maximum_do_not_overflow,
    test_windows_inside_of_the_image,
)
from tests.ops_dcnv4.cases import (
    DTYPES,
    Parameters,
    Result,
    Tensors,
    assert_equal,
    random_tensors,
    run_operator,
    run_reference,
)
from tests.ops_dcnv4.test_ops import *  # noqa: F403  tests for every backend

GIB = 2**30
FAST_DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def image_size() -> tuple[int, int]:
    return 56, 56


def compute(tensors: Tensors, p: Parameters) -> Result:
    """Return output and gradients of tensors on the GPU, without copying them to the CPU."""
    inputs = [t.detach().requires_grad_() for t in tensors[:2]]
    output = dcnv4(*inputs, *p)
    return Result(output.detach(), *torch.autograd.grad(output, inputs, tensors.grad_output))


def to_cpu(result: Result) -> Result:
    return Result(*(tensor.cpu() for tensor in result))


# Sizes and reproducibility


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", FAST_DTYPES)
@pytest.mark.parametrize(("size", "groups"), [((14, 14), 16), ((7, 7), 32)])
def test_image_in_a_large_batch_equals_the_image_alone(size, groups, dtype, run, device):
    p = Parameters(groups=groups)
    tensors = random_tensors(p, 64, size, group_channels=16).to(dtype).to(device)
    together = run(tensors, p)
    for i in range(64):
        alone = run(Tensors(*(t[i : i + 1] for t in tensors)), p)
        assert_equal(Result(*(t[i : i + 1] for t in together)), alone)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic_results_are_reproducible(dtype, run):
    p = Parameters(groups=8)
    tensors = random_tensors(p, 4, (28, 28), group_channels=16).to(dtype)
    expected = run(tensors, p)
    for _ in range(3):
        assert_equal(run(tensors, p), expected)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(("batch", "groups"), [(65537, 1), (1, 8 * 65535 + 5)])
def test_more_images_or_groups_than_the_grid_limit(batch, groups, run, assert_near):
    p = Parameters(groups=groups, kernel_size=(1, 1), padding=(0, 0))
    tensors = random_tensors(p, batch, (1, 2), group_channels=1, padding_channels=0)
    for actual, expected in zip(run(tensors, p), run_reference(tensors, p), strict=True):
        assert_near(actual, expected, 1e-12)


def skip_without_memory(size: int) -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < size:
        pytest.skip(f"needs {size / GIB:.0f} GiB of free memory, there are {free / GIB:.0f}")


def large_tensors(p: Parameters, *shape: int) -> Tensors:
    """Draw float16 tensors on the GPU, with coordinates that are exact in images of any size."""
    generator = torch.Generator("cuda").manual_seed(0)
    normal = functools.partial(torch.randn, generator=generator, device="cuda", dtype=torch.float16)
    offset_mask = normal(*shape[:3], 3 * p.groups * p.taps)
    offset_mask.clamp_(-5, 5).mul_(64).round_().div_(64)
    return Tensors(normal(shape), offset_mask, normal(shape))


def assert_same_halves(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Assert equality up to rounding, as the order of sums and the kernels may differ."""
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=4e-3, atol=2e-2)


def test_a_batch_beyond_32_bit_indices():
    skip_without_memory(56 * GIB)
    p, images = Parameters(groups=4), 33
    tensors = large_tensors(p, images, 1024, 1024, 64)
    assert min(t.numel() for t in tensors) > 2**31
    together = compute(tensors, p)
    for i in (0, images - 1):
        alone = compute(Tensors(*(t[i : i + 1] for t in tensors)), p)
        assert_same_halves(tuple(t[i : i + 1] for t in together), alone)


def test_an_image_beyond_32_bit_indices():
    skip_without_memory(64 * GIB)
    p = Parameters(groups=4)
    tensors = large_tensors(p, 1, 6400, 6400, 64)
    whole = compute(tensors, p)
    end = compute(Tensors(*(t[:, -64:] for t in tensors)), p)
    # A point is at most seven rows away from its output pixel.
    assert_same_halves(tuple(t[:, -40:] for t in whole), tuple(t[:, -40:] for t in end))


# Memory, streams and devices


def poison_free_memory() -> list[range]:
    """Fill free memory with bytes that are NaN in any dtype, and return its addresses.

    Blocks are allocated from large to small, so that they also fill gaps between tensors.
    """
    torch.cuda.empty_cache()
    sizes = [2**23] * 4 + [2**19] * 16 + [2**16] * 64 + [2**12] * 64 + [2**9] * 64
    blocks = [torch.full((n,), 0xFF, dtype=torch.uint8, device="cuda") for n in sizes]
    return [range(block.data_ptr(), block.data_ptr() + block.nbytes) for block in blocks]


@pytest.mark.parametrize("group_channels", [5, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_of_the_results_is_written(dtype, group_channels, device):
    p = Parameters(groups=3)
    tensors = random_tensors(p, 4, (30, 29), group_channels).to(dtype).to(device)
    poisoned = poison_free_memory()
    for result in compute(tensors, p):
        assert any(result.data_ptr() in addresses for addresses in poisoned)
        assert result.isfinite().all()


@pytest.mark.usefixtures("deterministic")
def test_runs_on_the_current_stream(run, device):
    p = Parameters(groups=4)
    tensors = random_tensors(p, group_channels=16).to(torch.float32).to(device)
    expected = run(tensors, p)
    late = Tensors(*(torch.zeros_like(t) for t in tensors))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(500_000_000)
        for to, tensor in zip(late, tensors, strict=True):
            to.copy_(tensor)
        assert_equal(run(late, p), expected)


def test_runs_on_the_device_of_its_tensors(run):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    p = Parameters()
    tensors = random_tensors(p)
    assert torch.cuda.current_device() == 0
    result = compute(tensors.to("cuda:1"), p)
    assert {str(t.device) for t in result} == {"cuda:1"}
    for actual, expected in zip(to_cpu(result), run(tensors, p), strict=True):
        torch.testing.assert_close(actual, expected)


def test_tensors_on_two_devices_are_rejected(device):
    value, offset_mask, grad_output = random_tensors(Parameters())
    with pytest.raises(ValueError, match="value and offset_mask must be on one device"):
        dcnv4(value.to(device), offset_mask, *Parameters())
    output = dcnv4(value.to(device).requires_grad_(), offset_mask.to(device), *Parameters())
    with pytest.raises(RuntimeError, match="device"):
        output.backward(grad_output)


@pytest.mark.parametrize("dtype", FAST_DTYPES)
def test_calls_do_not_synchronize_with_the_gpu(dtype, device):
    p = Parameters(groups=4)
    tensors = random_tensors(p, group_channels=16).to(dtype).to(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        compute(tensors, p)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def replay(
    compute: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    others: Sequence[tuple[Tensor, ...]],
) -> Iterator[tuple[Tensor, ...]]:
    """Capture compute(inputs) in a CUDA graph and yield CPU results for other inputs."""
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(3):
            compute(inputs)
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = compute(inputs)
    for other in others:
        for to, tensor in zip(inputs, other, strict=True):
            to.copy_(tensor)
        graph.replay()
        yield tuple(result.cpu() for result in results)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", FAST_DTYPES)
def test_a_cuda_graph_can_be_replayed_with_other_inputs(dtype, run, device):
    p = Parameters(groups=4)
    example, *others = (
        random_tensors(p, group_channels=16, seed=seed).to(dtype) for seed in range(3)
    )
    results = replay(lambda tensors: compute(tensors, p), example.to(device), others)
    for result, other in zip(results, others, strict=True):
        assert_equal(result, run(other, p))


def gpu_activities(function: Callable[[], object]) -> list[str]:
    """Return the names of the kernels, copies and fills that a call launches."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return [event.name for event in profile.events() if event.device_type == on_gpu]


@pytest.mark.parametrize(("dtype", "backward"), [(torch.float32, 2), (torch.float16, 3)])
def test_only_the_necessary_kernels_are_launched(dtype, backward, device):
    p = Parameters(groups=4)
    value, offset_mask, grad_output = random_tensors(p, group_channels=16).to(dtype).to(device)
    operators = torch.ops.ops_dcnv4
    (kernel,) = gpu_activities(lambda: operators.dcnv4(value, offset_mask, *p))
    assert "forward" in kernel
    # One fill with zeros, the kernel, and the rounding of 16-bit gradients.
    names = gpu_activities(lambda: operators.dcnv4_backward(grad_output, value, offset_mask, *p))
    assert len(names) == backward
    assert "backward" in names[1]


# Without nvcc


def test_the_reference_gives_the_same_results_on_a_gpu(device, assert_near):
    p = Parameters(stride=(2, 1), remove_center=True)
    tensors = random_tensors(p)
    actual = to_cpu(run_reference(tensors.to(device), p))
    for a, expected in zip(actual, run_operator(tensors, p), strict=True):
        assert_near(a, expected, 1e-12)
