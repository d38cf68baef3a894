"""Tests of the serial CUDA emulator itself."""

import ctypes
import faulthandler
import functools
import os
import signal
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.cuda_model.build import AVAILABLE, HERE, build_library

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Linux and g++")

FORWARD, REVERSE = 0, -1


@functools.cache
def library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build_library([HERE / "model.cpp", HERE / "selftest.cu"])))
    library.launcher.restype = ctypes.c_void_p
    library.set_order.argtypes = [ctypes.c_int64]
    return library


def launch(kernel: str, grid=(1, 1, 1), block=(32, 1, 1), shared_bytes=0, arguments=()) -> None:
    """Run a kernel of selftest.cu; its arguments are tensors and ints."""
    pointers = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    types = [ctypes.c_void_p if isinstance(a, Tensor) else ctypes.c_int for a in arguments]
    dim3 = ctypes.c_uint * 3
    function = ctypes.CFUNCTYPE(ctypes.c_char_p, dim3, dim3, ctypes.c_size_t, *types)
    launcher = function(library().launcher(kernel.encode()))
    if error := launcher(dim3(*grid), dim3(*block), shared_bytes, *pointers):
        raise RuntimeError(error.decode())


@pytest.fixture
def set_order() -> Iterator:
    yield library().set_order
    library().set_order(FORWARD)


# ---- Indices and limits


def test_every_thread_of_every_block_runs_once_with_its_indices():
    grid, block = (2, 3, 4), (5, 6, 7)
    indices = torch.zeros(*grid[::-1], *block[::-1], 6, dtype=torch.int)
    launch("write_indices", grid, block, arguments=[indices])
    sizes = [torch.arange(n, dtype=torch.int) for n in (*grid[::-1], *block[::-1])]
    expected = torch.stack(torch.meshgrid(*sizes, indexing="ij"), dim=-1)
    assert torch.equal(indices, expected)


@pytest.mark.parametrize("block", [(1024, 1, 1), (1, 1024, 1), (16, 1, 64), (1, 1, 1)])
def test_the_largest_blocks_are_accepted(block):
    launch("do_nothing", block=block, shared_bytes=48 * 1024)


@pytest.mark.parametrize("grid", [(100_000, 1, 1), (1, 65535, 1), (1, 1, 65535)])
def test_long_grids_are_accepted(grid):
    launch("do_nothing", grid, (1, 1, 1))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (
            {"block": (1025, 1, 1)},
            r"block \(1025, 1, 1\) of 1025 threads, accepted .* 1024 threads",
        ),
        ({"block": (32, 33, 1)}, r"block \(32, 33, 1\) of 1056 threads"),
        ({"block": (1, 1, 65)}, r"block \(1, 1, 65\)"),
        ({"block": (65536, 65536, 1)}, r"block \(65536, 65536, 1\)"),
        ({"block": (32, 0, 1)}, r"block \(32, 0, 1\)"),
        ({"grid": (0, 1, 1)}, r"grid \(0, 1, 1\), accepted are 1 to"),
        ({"grid": (2**31, 1, 1)}, r"grid \(2147483648, 1, 1\)"),
        ({"grid": (1, 65536, 1)}, r"grid \(1, 65536, 1\)"),
        ({"grid": (1, 1, 65536)}, r"grid \(1, 1, 65536\)"),
        ({"shared_bytes": 48 * 1024 + 1}, "49153 bytes of shared memory, accepted are 0 to 49152"),
    ],
)
def test_a_launch_beyond_the_limits_is_an_error(limits, message):
    with pytest.raises(RuntimeError, match=f"launch refused: {message}"):
        launch("do_nothing", **limits)


# ---- Barriers


@pytest.mark.parametrize("order", [FORWARD, REVERSE, 1])
@pytest.mark.parametrize("threads", [32, 256, 1024])
def test_a_block_reduces_through_shared_memory(threads, order, set_order):
    set_order(order)
    x = torch.randint(100, (3, threads)).float()
    sums = torch.zeros(3)
    launch("block_sum", (3, 1, 1), (threads, 1, 1), 4 * threads, [x, sums])
    assert torch.equal(sums, x.sum(1))


def test_barriers_do_not_wait_for_exited_threads():
    out = torch.full((64,), -1.0)
    launch("early_exits", block=(64, 1, 1), shared_bytes=160, arguments=[out])
    assert out.tolist() == [*reversed(range(40)), *[-1] * 24]


def test_a_block_waiting_at_two_barriers_is_an_error():
    lines = (HERE / "selftest.cu").read_text().splitlines()
    first = lines.index("__global__ void barriers_apart() {") + 3
    barrier = r"__syncthreads at \S+/selftest.cu"
    message = (
        rf"^block \(0, 0, 0\): thread \(0, 0, 0\) waits for {barrier}:{first}, "
        rf"but thread \(32, 0, 0\) for {barrier}:{first + 2}$"
    )
    with pytest.raises(RuntimeError, match=message):
        launch("barriers_apart", block=(64, 1, 1))


def test_a_shuffle_and_a_barrier_do_not_match():
    message = r"__shfl_sync at .* with mask 0xffffffff, but thread \(3, 0, 0\) waits for __syncthre"
    with pytest.raises(RuntimeError, match=message):
        launch("barrier_and_shuffle")


# ---- Warp operations


@pytest.mark.parametrize("width", [2, 8, 32])
def test_xor_shuffles_reduce_segments(width):
    x = torch.randint(100, (64,)).float()
    sums = x.clone()
    launch("xor_sums", block=(64, 1, 1), arguments=[sums, width])
    assert torch.equal(sums, x.view(-1, width).sum(1).repeat_interleave(width))


def test_a_mask_may_include_lanes_beyond_the_block():
    x = torch.randint(100, (40,)).float()
    sums = x.clone()
    launch("xor_sums", block=(40, 1, 1), arguments=[sums, 8])
    assert torch.equal(sums, x.view(-1, 8).sum(1).repeat_interleave(8))


def test_lanes_are_numbered_along_x_then_y_then_z():
    x = torch.randint(100, (64,)).float()
    sums = x.clone()
    launch("xor_sums_3d", block=(4, 2, 8), arguments=[sums])
    assert torch.equal(sums, x.view(-1, 32).sum(1).repeat_interleave(32))


def test_halves_of_a_warp_can_diverge():
    out = torch.zeros(32, dtype=torch.double)
    launch("half_warps", arguments=[out])
    assert out.tolist() == [120.0] * 16 + [16.0] * 16


@pytest.mark.parametrize("width", [1, 8, 32])
@pytest.mark.parametrize("operand", [0, 1, 5, 8, 31])
def test_shuffles_read_the_same_lane_as_in_cuda(operand, width):
    out = torch.zeros(4, 32, dtype=torch.int)
    launch("shuffle_kinds", arguments=[out, operand, width])
    for lane in range(32):
        first = lane // width * width
        assert out[0, lane] == first + operand % width
        assert out[1, lane] == (lane - operand if lane - operand >= first else lane)
        assert out[2, lane] == (lane + operand if lane + operand < first + width else lane)
        assert out[3, lane] == (lane ^ operand if lane ^ operand < first + width else lane)


def test_votes():
    out = torch.zeros(4, 32, dtype=torch.int)
    launch("votes", arguments=[out])
    assert out[0].unique().tolist() == [sum(1 << lane for lane in range(0, 30, 3)) | 1 << 30]
    assert out[1:, 0].tolist() == [1, 1, 0]
    assert (out == out[:, :1]).all()


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (
            "exited_lane",
            r"__syncwarp at \S+ with mask 0xffffffff, but thread \(7, 0, 0\) has exited",
        ),
        ("different_masks", r"with mask 0x1ff, but thread \(8, 0, 0\) waits for .* 0xffffffff"),
        (
            "different_lines",
            r"__shfl_sync at \S+ with .*, but thread \(8, 0, 0\) waits for __shfl_s",
        ),
        ("not_in_its_mask", r"thread \(8, 0, 0\): .* with mask 0xff does not name its own lane 8"),
        ("reads_outside_of_mask", r"__shfl_sync at \S+ .* reads lane 8, which takes no part"),
        ("odd_width", "has width 12, accepted are 1, 2, 4, 8, 16, 32"),
    ],
)
def test_a_misused_warp_operation_is_an_error(kernel, message):
    with pytest.raises(RuntimeError, match=message):
        launch(kernel)


def test_reading_a_lane_beyond_the_block_is_an_error():
    with pytest.raises(RuntimeError, match=r"thread \(0, 0, 0\): .* reads lane 16, which takes no"):
        launch("reads_absent_lane", block=(16, 1, 1))


# ---- Shared memory


def test_shared_memory_is_nan_at_the_start_of_every_block():
    found = torch.zeros(3, 32)
    launch("find_shared", (3, 1, 1), shared_bytes=128, arguments=[found])
    assert found.isnan().all()


@pytest.mark.parametrize("at", [-1, -128, 100, 111])
def test_writing_just_outside_of_shared_memory_is_an_error(at):
    with pytest.raises(RuntimeError, match="wrote outside of its 100 bytes of shared memory"):
        launch("write_shared", shared_bytes=100, arguments=[at])


@pytest.mark.parametrize("access", ["write_shared", "read_shared"])
@pytest.mark.parametrize(("shared_bytes", "at"), [(100, 112), (64, 64), (0, 0), (49152, 49152)])
def test_access_beyond_shared_memory_is_a_segmentation_fault(access, shared_bytes, at):
    library()
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        launch(access, shared_bytes=shared_bytes, arguments=[at])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV


def test_a_misaligned_access_is_an_error():
    x, to = torch.arange(12.0), torch.zeros(32)
    launch("load_four", arguments=[x, to, 4])
    assert (to == 7).all()
    message = (
        r"thread \(0, 0, 0\): an access at \S+ needs 16-byte alignment, the address is 4 bytes"
    )
    with pytest.raises(RuntimeError, match=message):
        launch("load_four", arguments=[x, to, 5])


# ---- Errors and order


def test_an_exception_in_a_kernel_is_rethrown_and_unwinds_all_threads():
    for _ in range(3):
        ended = torch.zeros(1, dtype=torch.int)
        with pytest.raises(RuntimeError, match=r"^thrown in the kernel$"):
            launch("throws", block=(64, 1, 1), arguments=[ended])
        assert ended == 64  # all threads were unwound
        test_a_block_reduces_through_shared_memory(256, FORWARD, library().set_order)


def test_launches_from_other_threads():
    def add_up() -> None:
        for _ in range(20):
            sums = torch.ones(64)
            launch("xor_sums", block=(64, 1, 1), arguments=[sums, 32])
            results.append(sums)

    results = []
    add_up()
    threads = [threading.Thread(target=add_up) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    assert all((sums == 32).all() for sums in results)


@pytest.mark.parametrize("kernel", ["neighbor", "next_warp"])
def test_orders_reveal_a_missing_barrier(kernel, set_order):
    def in_orders(kernel: str) -> list[Tensor]:
        results = []
        for order in (FORWARD, REVERSE, 1, 2):
            set_order(order)
            results.append(torch.zeros(64, dtype=torch.int))
            launch(kernel, block=(64, 1, 1), shared_bytes=256, arguments=[results[-1]])
        return results

    first, *others = in_orders(f"{kernel}<true>")
    assert all(torch.equal(first, other) for other in others)
    first, *others = in_orders(f"{kernel}<false>")
    assert all((first != other).any() for other in others[:1])


def test_threads_run_in_the_requested_order(set_order):
    def turns(order: int) -> list[int]:
        set_order(order)
        out, turn = torch.zeros(400, dtype=torch.int), torch.zeros(1, dtype=torch.int)
        launch("record_turns", (4, 1, 1), (100, 1, 1), arguments=[out, turn])
        return out.tolist()

    assert turns(FORWARD) == list(range(400))
    assert turns(REVERSE) == list(reversed(range(400)))
    assert sorted(turns(7)) == list(range(400))
    assert turns(7) == turns(7) != turns(8)


def test_atomic_additions():
    sums = [torch.zeros(1, dtype=t) for t in (torch.float, torch.double, torch.int, torch.int64)]
    launch("add_up", (2, 1, 1), (50, 1, 1), arguments=sums)
    assert [s.item() for s in sums] == [50, 50, 200, 300]


def test_a_compilation_error_contains_the_compilers_message(tmp_path):
    source = tmp_path / "wrong.cu"
    source.write_text("int x = unknown;")
    with pytest.raises(RuntimeError, match=r"wrong\.cu:1:9: error: .unknown. was not declared"):
        build_library([source])
