"""Tests of the Triton kernels, compiled without a GPU and run in Triton's interpreter.

The interpreter is enabled when triton is imported, and would affect other tests that use triton.
Therefore this module runs itself again in a separate process with TRITON_INTERPRET set.
"""

import functools
import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings

from tests.ops_dcnv4 import attention_cases, test_attention
from tests.ops_dcnv4.attention_cases import FORMS, random_inputs
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
from ops_dcnv4 import triton_kernels  # noqa: E402  imports triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    from tests.ops_dcnv4.test_ops import TestSumsIn32Bits as SharedSums
    from tests.ops_dcnv4.test_ops import (  # noqa: F401
        test_a_pixel_is_read_only_by_adjacent_points,
        test_edges_are_exclusive_and_gradients_at_pixels_are_right_sided,
        test_empty_batch,
        test_output_gradient_of_a_point_outside_the_image_is_ignored,
        test_published_operator,
        test_results_do_not_depend_on_the_memory_layout,
    )


run_dcnv4 = functools.partial(run_reference, module=triton_kernels)
run_attention = functools.partial(attention_cases.run_reference, module=triton_kernels)
both_forms = pytest.mark.parametrize("form", FORMS)
ONE_LEVEL = {"shapes": ((3, 4),), "points": 1, "heads": 1, "head_channels": 3}
TWO_LEVELS = {"shapes": ((4, 5), (1, 1)), "points": 2, "heads": 3, "head_channels": 40}
WIDE = {"points": 1, "head_channels": 512, "batch": 1, "queries": 2}


# Compiled


class TestCompiled:
    __test__ = not INTERPRETED

    @pytest.fixture
    def grids(self) -> list[tuple[int, ...]]:
        """Return a list to which each launch appends its grid."""
        return []

    @pytest.fixture
    def compiled(self, monkeypatch, tmp_path, grids) -> list:
        """Compile kernels instead of launching them, so that tensors can be on the CPU."""
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

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("dtype", "group_channels"), [(torch.bfloat16, 16), (torch.float64, 160)]
    )
    def test_dcnv4_is_accepted(self, dtype, group_channels, compiled):
        p = Parameters(offset_scale=0.3, remove_center=True)
        run_dcnv4(random_tensors(p, group_channels=group_channels).to(dtype), p)
        assert all(kernel.asm["ptx"] for kernel in compiled)
        assert len(compiled) == 2

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("dtype", "points_dtype"), [(torch.float16, torch.float32), (torch.float64, torch.float64)]
    )
    def test_attention_is_accepted(self, dtype, points_dtype, compiled):
        for form in FORMS:
            run_attention(random_inputs().to(dtype, points_dtype), form)
        assert all(kernel.asm["ptx"] for kernel in compiled)
        assert len(compiled) == 4

    @pytest.mark.slow
    @pytest.mark.usefixtures("in_order")
    def test_deterministic_launches_use_one_thread_per_channel(self, compiled, grids, monkeypatch):
        monkeypatch.setattr(triton_kernels, "MAX_INT32", 0)
        run_dcnv4(random_tensors(Parameters()), Parameters())
        assert grids[1] == (2 * 2,)  # images and groups
        layouts = re.findall(
            r"tt.atomic_rmw .* tensor<1x8xf64, (#\w+)>\n?", compiled[1].asm["ttgir"]
        )
        assert len(layouts) == 4
        assert len(set(layouts)) == 1


@pytest.mark.slow
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
    """Replace the shared fixture: one thread is deterministic, and sums in order take minutes."""


@pytest.fixture(scope="module", autouse=INTERPRETED)
def _fast_interpreter():
    """Speed up the interpreter: no overflow checks, cached set-up and look-ups, few programs."""
    from triton.runtime import interpreter

    look_up, numpy_dtypes = interpreter._get_np_dtype, {}

    def numpy_dtype(dtype):
        if dtype.name not in numpy_dtypes:
            numpy_dtypes[dtype.name] = look_up(dtype)
        return numpy_dtypes[dtype.name]

    with pytest.MonkeyPatch.context() as patch:
        for function in (triton_kernels._cell, triton.language.zeros):
            interpreter._patch_lang(function.fn)
        patch.setattr(interpreter, "_patch_lang", lambda _: interpreter._LangPatchScope())
        patch.setattr(interpreter, "_get_np_dtype", numpy_dtype)
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
        p = Parameters(kernel_size=(1, 9), padding=(0, 0), groups=1)
        modulation = torch.tensor([256.0, *[1.0] * 8])
        offset_mask = torch.cat((torch.zeros(2 * p.taps), modulation)).view(1, 1, 1, -1)
        tensors = torch.ones(1, 1, 9, 1).bfloat16(), offset_mask.bfloat16()
        assert triton_kernels.dcnv4(*tensors, *p).item() == 264  # In bfloat16, 256 + 1 is 256.

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(problem=problems())
    def test_equals_reference_for_all_parameters(self, problem, assert_near):
        p, shapes = problem
        tensors = random_tensors(p, **shapes)
        for actual, expected in zip(run_dcnv4(tensors, p), run_reference(tensors, p), strict=True):
            assert_near(actual, expected, 1e-11)

    @pytest.mark.parametrize("name", ["PROGRAM_BYTES", "MAX_CHANNELS", "MAX_INT32"])
    def test_partition_of_the_work_does_not_change_results(self, name, monkeypatch, assert_near):
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
    def test_distant_and_non_finite_points(self, channel, offset, modulation, dtype, assert_near):
        p = Parameters()
        tensors = random_tensors(p).to(dtype)
        tensors.offset_mask[..., [channel, MODULATION]] = torch.tensor([offset, modulation]).to(
            dtype
        )
        assert_tap_contributes_nothing(tensors, p, run_dcnv4, assert_near)


@pytest.fixture
def in_order() -> Iterator[None]:
    """Sum in a fixed order, as the shared fixture `deterministic` does for other backends."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class TestAttention:
    __test__ = INTERPRETED

    @pytest.fixture
    def run(self) -> attention_cases.Run:
        return run_attention

    test_published_operator = staticmethod(test_attention.test_published_operator)
    test_16_bits = staticmethod(test_attention.test_16_bit_results_are_rounded_only_once)
    test_memory_layout = staticmethod(
        test_attention.test_results_do_not_depend_on_the_memory_layout
    )
    test_empty_work_gives_zeros = staticmethod(test_attention.test_empty_work_gives_zeros)
    test_edges = staticmethod(
        test_attention.test_edges_are_exclusive_and_gradients_at_pixels_are_right_sided
    )

    @pytest.mark.parametrize(
        ("sizes", "dtype"),
        [
            *itertools.product((ONE_LEVEL, TWO_LEVELS), (torch.float64, torch.float32)),
            *itertools.product((WIDE,), DTYPES),
        ],
    )
    @both_forms
    def test_equals_reference(self, form, sizes, dtype, assert_near):
        inputs = random_inputs(**sizes).to(dtype)
        exact = attention_cases.run_exactly(inputs, form)
        for actual, expected in zip(run_attention(inputs, form), exact, strict=True):
            assert actual.dtype == dtype
            if dtype.itemsize == 2:
                assert_rounded_once(actual, expected)
            else:
                assert_near(actual, expected, 1e-12 if dtype == torch.float64 else 1e-5)

    @pytest.mark.parametrize("nowhere", [1e30, -math.inf, math.nan])
    def test_distant_and_non_finite_points(self, nowhere, run, assert_near):
        in_float64 = torch.float64, 5, run, assert_near
        test_attention.test_distant_and_non_finite_points_contribute_nothing(
            math.nan, 0, nowhere, *in_float64
        )
        test_attention.test_distant_and_non_finite_points_keep_their_softmax_weight(
            nowhere, *in_float64
        )

    @both_forms
    def test_output_gradient_of_a_query_outside_is_ignored(self, form, run, assert_near):
        test_attention.test_output_gradient_of_a_query_outside_the_images_is_ignored(
            form, math.nan, run, assert_near
        )

    @pytest.mark.parametrize("sizes", [{"shapes": ()}, {"points": 0}])
    @both_forms
    def test_empty_levels_and_points_give_zeros(self, form, sizes, run):
        test_attention.test_empty_work_gives_zeros(form, sizes, run)

    @pytest.mark.parametrize(
        ("shape", "start"),
        [((4, 5), 28), ((4, 5), -1), ((2**40, 2**40), 0), ((-1, -5), 0), ((0, 3), 0), ((48, 1), 0)],
    )
    @both_forms
    def test_a_level_outside_of_value_has_no_pixels(self, form, shape, start, assert_near):
        inputs = random_inputs(points=1)  # 47 pixels
        inputs.spatial_shapes[0], inputs.level_start_index[0] = torch.zeros(2), 0
        expected = attention_cases.run_reference(inputs, form)
        inputs.spatial_shapes[0], inputs.level_start_index[0] = torch.tensor(shape), start
        for actual, wanted in zip(run_attention(inputs, form), expected, strict=True):
            assert_near(actual, wanted, 1e-12)

    @pytest.mark.usefixtures("in_order")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @both_forms
    def test_image_in_a_batch_equals_the_image_alone(self, form, dtype):
        inputs = random_inputs(points=1, queries=3).to(dtype)
        together = run_attention(inputs, form)
        torch.testing.assert_close(together, attention_cases.run_reference(inputs, form))
        alone = run_attention(inputs.of_image(1), form)
        assert_equal(attention_cases.Result(*(t[1:] for t in together)), alone)

    @pytest.mark.parametrize("name", ["PROGRAM_BYTES", "MAX_CHANNELS", "MAX_INT32"])
    @both_forms
    def test_partition_of_the_work_does_not_change_results(
        self, form, name, monkeypatch, assert_near
    ):
        inputs = random_inputs(points=1)
        expected = run_attention(inputs, form)
        changed = {"PROGRAM_BYTES": 8 * 8 * 4, "MAX_CHANNELS": 4, "MAX_INT32": 0}
        monkeypatch.setattr(triton_kernels, name, changed[name])
        for actual, wanted in zip(run_attention(inputs, form), expected, strict=True):
            assert_near(actual, wanted, 1e-14)
