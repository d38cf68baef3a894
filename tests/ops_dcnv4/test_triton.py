"""The Triton kernels: compiled for a GPU that need not be there, and run in Triton's interpreter.

The interpreter is chosen when triton is imported, and would affect other tests that use it. So this
module runs itself once more in a process of its own, where TRITON_INTERPRET is set.
"""

import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from ops_dcnv4 import reference
from tests.ops_dcnv4.cases import (
    DTYPES,
    Parameters,
    Result,
    Run,
    Tensors,
    assert_equal,
    assert_rounded_once,
    random_tensors,
    run_exactly,
    run_reference,
)
from tests.ops_dcnv4.test_ops import MODULATION, X, Y, assert_tap_contributes_nothing, problems

triton = pytest.importorskip("triton")
triton_kernels = pytest.importorskip("ops_dcnv4.triton_kernels")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GOLDENS = sorted((Path(__file__).parents[1] / "data" / "msda").glob("*.npz"))

if INTERPRETED:
    from tests.ops_dcnv4.test_ops import TestSumsIn32Bits as SharedSums
    from tests.ops_dcnv4.test_ops import (  # noqa: F401
        test_a_pixel_is_read_only_by_points_in_its_cells,
        test_a_point_outside_the_image_hides_its_output_gradient,
        test_edges_are_exclusive_and_slopes_at_pixels_look_forward,
        test_empty_batch,
        test_memory_layout_changes_nothing,
        test_published_operator,
    )


# Inputs


class Attention(NamedTuple):
    """Arguments of both forms of multi-scale deformable attention."""

    value: Tensor
    spatial_shapes: Tensor
    level_start_index: Tensor
    sampling_locations: Tensor
    attention_weights: Tensor
    sampling_loc_attn: Tensor
    grad_output: Tensor

    def to(self, dtype: torch.dtype, points_dtype: torch.dtype | None = None) -> "Attention":
        value, shapes, start, *points, grad_output = self
        points = (t.to(points_dtype or dtype) for t in points)
        return Attention(value.to(dtype), shapes, start, *points, grad_output.to(dtype))

    def image(self, i: int) -> "Attention":
        images = (t if t.dtype == torch.int64 else t[i : i + 1] for t in self)
        return Attention(*images)


def random_attention(
    sizes=((4, 5), (2, 3)), points=1, heads=2, channels=5, batch=2, queries=3, seed=0
) -> Attention:
    """In float64, a third of the points outside."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shapes = torch.tensor(sizes, dtype=torch.int64).view(-1, 2)
    pixels = shapes.prod(1)
    locations = 0.5 + 0.5 * normal(batch, queries, heads, len(sizes), points, 2)
    logits = normal(batch, queries, heads, len(sizes), points)
    return Attention(
        normal(batch, int(pixels.sum()), heads, channels),
        shapes,
        pixels.cumsum(0) - pixels,
        locations,
        normal(batch, queries, heads, len(sizes), points),
        torch.cat((locations.flatten(3), logits.flatten(3)), dim=-1),
        normal(batch, queries, heads * channels),
    )


def run_attention(kernels, tensors: Attention) -> dict[str, Tensor]:
    """All that the four functions of a module return."""
    value, shapes, start, locations, weights, packed, grad_output = tensors
    separate, fused = (locations, weights), (packed, locations.shape[4])
    names = "value", "sampling_locations", "attention_weights"
    levels = value, shapes, start
    grads = kernels.ms_deform_attn_backward(grad_output, *levels, *separate)
    flash_grads = kernels.flash_deform_attn_backward(grad_output, *levels, *fused)
    return {
        "output": kernels.ms_deform_attn(*levels, *separate),
        **{f"grad_{name}": grad for name, grad in zip(names, grads, strict=True)},
        "flash_output": kernels.flash_deform_attn(*levels, *fused),
        "flash_grad_value": flash_grads[0],
        "flash_grad_sampling_loc_attn": flash_grads[1],
    }


def run_dcnv4(tensors: Tensors, p: Parameters) -> Result:
    value, offset_mask, grad_output = tensors
    output = triton_kernels.dcnv4(value, offset_mask, *p)
    return Result(output, *triton_kernels.dcnv4_backward(grad_output, value, offset_mask, *p))


# Compiled


class TestCompiled:
    __test__ = not INTERPRETED

    @pytest.fixture
    def grids(self) -> list[tuple[int, ...]]:
        """The grids of all launches."""
        return []

    @pytest.fixture
    def compiled(self, monkeypatch, tmp_path, grids) -> list:
        """The kernels of all launches, which are compiled instead; the tensors are on the CPU."""
        kernels = []

        def run(kernel, *arguments, grid, warmup, num_warps, **constants):
            names = kernel.arg_names
            types = map(triton.runtime.jit.mangle_type, arguments)
            signature = dict(zip(names, types, strict=False)) | dict.fromkeys(
                constants, "constexpr"
            )
            grids.append(grid)
            kernels.append(
                triton.compile(
                    triton.compiler.ASTSource(
                        kernel, signature, {(names.index(n),): v for n, v in constants.items()}
                    ),
                    target=triton.backends.compiler.GPUTarget("cuda", 90, 32),
                    options={"num_warps": num_warps},
                )
            )

        monkeypatch.setattr(triton.JITFunction, "run", run)
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        return kernels

    @pytest.mark.parametrize(
        ("dtype", "group_channels"), [(torch.bfloat16, 16), (torch.float64, 160)]
    )
    def test_dcnv4_is_accepted(self, dtype, group_channels, compiled):
        p = Parameters(offset_scale=0.3, remove_center=True)
        run_dcnv4(random_tensors(p, group_channels=group_channels).to(dtype), p)
        assert all(kernel.asm["ptx"] for kernel in compiled)
        assert len(compiled) == 2

    @pytest.mark.parametrize(
        ("dtype", "points_dtype"), [(torch.float16, torch.float32), (torch.float64, torch.float64)]
    )
    def test_attention_is_accepted(self, dtype, points_dtype, compiled):
        run_attention(triton_kernels, random_attention().to(dtype, points_dtype))
        assert all(kernel.asm["ptx"] for kernel in compiled)
        assert len(compiled) == 4

    @pytest.mark.usefixtures("in_order")
    def test_in_order_one_thread_adds_to_a_channel(self, compiled, grids, monkeypatch):
        monkeypatch.setattr(triton_kernels, "MAX_INT32", 0)
        run_dcnv4(random_tensors(Parameters()), Parameters())
        assert grids[1] == (2 * 2,)  # images and groups
        layouts = re.findall(
            r"tt.atomic_rmw .* tensor<1x8xf64, (#\w+)>\n?", compiled[1].asm["ttgir"]
        )
        assert len(layouts) == 4
        assert len(set(layouts)) == 1


def test_in_the_interpreter():
    assert not INTERPRETED
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stdout + process.stderr


test_in_the_interpreter.__test__ = not INTERPRETED


# Interpreted: DCNv4


@pytest.fixture(scope="module")
def run() -> Run:
    return run_dcnv4


@pytest.fixture
def deterministic() -> None:
    """Nothing: the interpreter has one thread. In order, it would take minutes."""


@pytest.fixture(scope="module", autouse=INTERPRETED)
def quick_interpreter():
    """No checks for overflow, nothing set up again in every function, few programs."""
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        for function in (triton_kernels._cell, triton.language.zeros):
            interpreter._patch_lang(function.fn)
        patch.setattr(interpreter, "_patch_lang", lambda _: interpreter._LangPatchScope())
        options = interpreter.InterpreterOptions(sanitize_overflow=False)
        patch.setattr(interpreter.interpreter_builder, "options", options)
        patch.setattr(triton_kernels, "PROGRAM_BYTES", 2**14)
        yield


if INTERPRETED:

    class TestSumsIn32Bits(SharedSums):
        test_over_the_taps = None  # takes minutes


class TestDcnv4:
    __test__ = INTERPRETED

    def test_sums_over_the_taps_in_32_bits(self):
        p = Parameters(kernel_size=(1, 264), padding=(0, 0), groups=1)
        offset_mask = torch.cat((torch.zeros(2 * p.taps), torch.ones(p.taps))).view(1, 1, 1, -1)
        tensors = torch.ones(1, 1, 264, 1).bfloat16(), offset_mask.bfloat16()
        assert triton_kernels.dcnv4(*tensors, *p).item() == 264  # counting in bfloat16 stops at 256

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(problem=problems())
    def test_equals_reference_for_all_parameters(self, problem, assert_near):
        p, shapes = problem
        tensors = random_tensors(p, **shapes)
        for actual, expected in zip(run_dcnv4(tensors, p), run_reference(tensors, p), strict=True):
            assert_near(actual, expected, 1e-11)

    @pytest.mark.parametrize("name", ["PROGRAM_BYTES", "MAX_CHANNELS", "MAX_INT32"])
    def test_division_of_the_work_changes_nothing(self, name, monkeypatch, assert_near):
        p = Parameters(kernel_size=(2, 1), groups=3)
        tensors = random_tensors(p, batch=1, size=(3, 2), group_channels=9)
        expected = run_dcnv4(tensors, p)
        changed = {"PROGRAM_BYTES": 16 * 8 * 4, "MAX_CHANNELS": 4, "MAX_INT32": 0}
        monkeypatch.setattr(triton_kernels, name, changed[name])
        for actual, wanted in zip(run_dcnv4(tensors, p), expected, strict=True):
            assert_near(actual, wanted, 1e-14)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_image_in_a_batch_equals_the_image_alone(self, dtype):
        p = Parameters(kernel_size=(1, 2), padding=(0, 1), groups=3)
        tensors = random_tensors(p, size=(3, 5), group_channels=20).to(dtype)
        together = run_dcnv4(tensors, p)
        for i in range(2):
            alone = run_dcnv4(Tensors(*(t[i : i + 1] for t in tensors)), p)
            assert_equal(Result(*(t[i : i + 1] for t in together)), alone)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_16_bit_results_are_rounded_only_once(self, dtype):
        p = Parameters(kernel_size=(2, 2), stride=(2, 1), offset_scale=2.0)
        tensors = random_tensors(p, group_channels=20).to(dtype)
        for actual, exact in zip(run_dcnv4(tensors, p), run_exactly(tensors, p), strict=True):
            assert actual.dtype == dtype
            assert_rounded_once(actual, exact)

    @pytest.mark.usefixtures("in_order")
    def test_sums_in_order(self, assert_near):
        p = Parameters(kernel_size=(1, 2), padding=(0, 1), groups=2)
        tensors = random_tensors(p, size=(2, 3), group_channels=3).to(torch.float32)
        result = run_dcnv4(tensors, p)
        for actual, expected in zip(result, run_exactly(tensors, p), strict=True):
            assert_near(actual, expected, 1e-6)
        alone = run_dcnv4(Tensors(*(t[1:] for t in tensors)), p)
        assert_equal(Result(*(t[1:] for t in result)), alone)

    @pytest.mark.parametrize(
        ("channel", "offset", "modulation", "dtype"),
        [
            (X, math.nan, 1.0, torch.float32),
            (Y, -math.inf, math.inf, torch.float64),
            (X, 1e30, math.nan, torch.bfloat16),
            (Y, 1e4, math.inf, torch.float16),
        ],
    )
    def test_a_point_nowhere_in_the_image(self, channel, offset, modulation, dtype, assert_near):
        p = Parameters()
        tensors = random_tensors(p).to(dtype)
        tensors.offset_mask[..., [channel, MODULATION]] = torch.tensor([offset, modulation]).to(
            dtype
        )
        assert_tap_contributes_nothing(tensors, p, run_dcnv4, assert_near)


@pytest.fixture
def in_order() -> Iterator[None]:
    """Not the fixture `deterministic`, which the shared tests ask for."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class TestAttention:
    __test__ = INTERPRETED

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
    @pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
    def test_published_operator(self, path, dtype, tolerance, assert_near):
        golden = {name: torch.from_numpy(array) for name, array in np.load(path).items()}
        tensors = Attention(*(golden[name] for name in Attention._fields)).to(dtype)
        for name, actual in run_attention(triton_kernels, tensors).items():
            if name != "flash_grad_value":
                assert_near(actual, golden[name.removeprefix("flash_")], tolerance)

    @pytest.mark.parametrize(
        "shapes",
        [
            {"sizes": [(3, 4)], "points": 1, "heads": 1, "channels": 3},
            {"sizes": [(4, 5), (1, 1)], "points": 2, "heads": 3, "channels": 40},
            {"channels": 512, "batch": 1, "queries": 2},
        ],
        ids=["small", "two_levels", "wide"],
    )
    @pytest.mark.parametrize(
        ("dtype", "points_dtype"),
        [*zip(DTYPES, DTYPES, strict=True), (torch.float16, torch.float32)],
    )
    def test_equals_reference(self, shapes, dtype, points_dtype, assert_near):
        tensors = random_attention(**shapes).to(dtype, points_dtype)
        expected = run_attention(reference, tensors)
        exact = run_attention(reference, tensors.to(torch.float64))
        for name, actual in run_attention(triton_kernels, tensors).items():
            assert actual.dtype == expected[name].dtype
            if actual.dtype.itemsize == 2:
                assert_rounded_once(actual, exact[name])
            else:
                assert_near(actual, exact[name], 1e-12 if dtype == torch.float64 else 1e-5)

    @pytest.mark.parametrize("nowhere", [1e30, -math.inf, math.nan])
    def test_a_point_nowhere_contributes_nothing(self, nowhere, assert_near):
        tensors = random_attention()
        tensors.sampling_locations[..., 1, 0, 0] = nowhere
        tensors.sampling_loc_attn[..., 2] = nowhere  # level 1, point 0: x
        expected = run_attention(reference, tensors)
        tensors.attention_weights[..., 1, 0] = math.nan
        for name, actual in run_attention(triton_kernels, tensors).items():
            assert_near(actual, expected[name], 1e-12)

    def test_a_query_nowhere_hides_its_gradient(self, assert_near):
        tensors = random_attention()
        tensors.sampling_locations[:, 1] = -9
        tensors.sampling_loc_attn[:, 1, :, :4] = 9
        expected = run_attention(reference, tensors)
        tensors.grad_output[:, 1] = math.nan
        for name, actual in run_attention(triton_kernels, tensors).items():
            assert_near(actual, expected[name], 1e-12)

    @pytest.mark.parametrize(
        ("shape", "start"),
        [((4, 5), 7), ((4, 5), -1), ((2**40, 2**40), 0), ((-1, -5), 0), ((0, 3), 0), ((27, 1), 0)],
    )
    def test_a_level_outside_of_value_has_no_pixels(self, shape, start, assert_near):
        tensors = random_attention()  # of 26 pixels
        tensors.spatial_shapes[0], tensors.level_start_index[0] = torch.zeros(2), 0
        expected = run_attention(reference, tensors)
        tensors.spatial_shapes[0], tensors.level_start_index[0] = torch.tensor(shape), start
        for name, actual in run_attention(triton_kernels, tensors).items():
            assert_near(actual, expected[name], 1e-12)

    @pytest.mark.parametrize(
        "empty", [{"batch": 0}, {"queries": 0}, {"points": 0}, {"sizes": ()}, {"channels": 0}]
    )
    def test_empty(self, empty):
        tensors = random_attention(**empty)
        expected = run_attention(reference, tensors)
        for name, actual in run_attention(triton_kernels, tensors).items():
            torch.testing.assert_close(actual, expected[name], rtol=0, atol=0)

    @pytest.mark.usefixtures("in_order")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_image_in_a_batch_equals_the_image_alone(self, dtype):
        tensors = random_attention().to(dtype)
        together = run_attention(triton_kernels, tensors)
        expected = run_attention(reference, tensors)
        for name, alone in run_attention(triton_kernels, tensors.image(1)).items():
            torch.testing.assert_close(together[name][1:], alone, rtol=0, atol=0)
            torch.testing.assert_close(together[name], expected[name])

    @pytest.mark.parametrize("name", ["PROGRAM_BYTES", "MAX_CHANNELS", "MAX_INT32"])
    def test_division_of_the_work_changes_nothing(self, name, monkeypatch, assert_near):
        tensors = random_attention()
        expected = run_attention(triton_kernels, tensors)
        changed = {"PROGRAM_BYTES": 8 * 8 * 4, "MAX_CHANNELS": 4, "MAX_INT32": 0}
        monkeypatch.setattr(triton_kernels, name, changed[name])
        for key, actual in run_attention(triton_kernels, tensors).items():
            assert_near(actual, expected[key], 1e-14)

    def test_memory_layout_changes_nothing(self):
        tensors = random_attention()
        scattered = Attention(*(torch.stack((t, t), dim=-1)[..., 0] for t in tensors))
        assert not any(t.is_contiguous() for t in scattered)
        expected = run_attention(triton_kernels, tensors)
        for name, actual in run_attention(triton_kernels, scattered).items():
            torch.testing.assert_close(actual, expected[name], rtol=0, atol=0)
