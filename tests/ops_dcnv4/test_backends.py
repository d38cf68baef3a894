"""Tests of the selection of the backend."""

import re

import pytest
import torch

from ops_dcnv4 import (
    backends,
    choose_backend,
    dcnv4,
    explain_backend,
    flash_deform_attn,
    is_compiled,
    library_path,
    reference,
    use_backend,
)
from tests import processes
from tests.ops_dcnv4 import attention_cases, cases

P = cases.Parameters()


@pytest.mark.parametrize(
    ("device_type", "compiled", "triton", "expected"),
    [
        ("cpu", True, True, "compiled"),
        ("cpu", False, True, "reference"),
        ("cuda", True, True, "compiled"),
        ("cuda", False, True, "triton"),
        ("cuda", False, False, "reference"),
        ("mps", True, True, "reference"),
        ("cuda:1", True, False, "compiled"),
        ("cuda:1", False, True, "triton"),
    ],
)
def test_order_of_backends(device_type, compiled, triton, expected, monkeypatch):
    reason = None if compiled else "not built"
    monkeypatch.setattr(backends, "_why_not_compiled", {"cpu": reason, "cuda": reason})
    monkeypatch.setattr(backends, "has_triton", lambda: triton)
    assert choose_backend(device_type) == expected
    with use_backend("reference"):
        assert choose_backend(device_type) == "reference"
    assert choose_backend(device_type) == expected


def record_calls(monkeypatch) -> list[str]:
    """Record the calls of the reference's functions by name."""
    calls = []

    def recorded(name, function):
        def run(*arguments):
            calls.append(name)
            return function(*arguments)

        return run

    for name in ("dcnv4", "dcnv4_backward", "ms_deform_attn", "flash_deform_attn_backward"):
        monkeypatch.setattr(reference, name, recorded(name, getattr(reference, name)))
    return calls


@pytest.mark.filterwarnings("error")
def test_a_forced_backend_computes_outputs_and_gradients(monkeypatch, assert_near):
    tensors = cases.random_tensors(P)
    inputs = attention_cases.random_inputs()
    expected = [cases.run_operator(tensors, P)]
    expected += [attention_cases.run_operator(inputs, form) for form in attention_cases.FORMS]
    calls = record_calls(monkeypatch)
    with use_backend("reference"):
        actual = [cases.run_operator(tensors, P)]
        assert calls == ["dcnv4", "dcnv4_backward"]
        actual += [attention_cases.run_operator(inputs, form) for form in attention_cases.FORMS]
    assert calls[2:] == ["ms_deform_attn", "ms_deform_attn", "flash_deform_attn_backward"]
    for results in zip(actual, expected, strict=True):
        for a, e in zip(*results, strict=True):
            assert_near(a, e, 1e-12)
    calls.clear()
    cases.run_operator(tensors, P)
    assert not calls


def test_contexts_nest_and_end_with_exceptions(monkeypatch):
    tensors = cases.random_tensors(P)
    calls = record_calls(monkeypatch)
    with use_backend("reference"):
        with use_backend("compiled"):
            cases.run_operator(tensors, P)
            assert not calls
        with pytest.raises(TypeError, match="value"), use_backend("compiled"):
            dcnv4(None, None)
        cases.run_operator(tensors, P)
        assert calls == ["dcnv4", "dcnv4_backward"]
    cases.run_operator(tensors, P)
    assert len(calls) == 2
    assert choose_backend("cpu") == "compiled"


def test_errors_name_unknown_and_missing_backends(monkeypatch):
    with pytest.raises(ValueError, match=r"name must be one of compiled, triton, .*'cuda'"):
        use_backend("cuda")
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    with pytest.raises(RuntimeError, match="requires the package triton"):
        use_backend("triton")
    assert choose_backend("cpu") == "compiled"
    value, offset_mask, _ = cases.random_tensors(P).to("meta")
    with use_backend("compiled"):
        assert dcnv4(value, offset_mask, *P).is_meta  # Meta tensors need no kernel.


def test_triton_on_the_cpu_requires_its_interpreter(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    value, offset_mask, _ = cases.random_tensors(P)
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"TRITON_INTERPRET=1.*'cpu'"):
        dcnv4(value, offset_mask, *P)


@pytest.mark.parametrize(
    ("device_type", "compiled", "triton", "reason"),
    [
        ("cpu", True, True, r"the compiled kernels were found \(ops_dcnv4\._C, instruction set"),
        (
            "cpu",
            False,
            True,
            r"are missing \(not built\)\. Install torch and a C\+\+ compiler, then",
        ),
        ("cuda:1", False, True, r"are missing \(not built\); Triton and a C compiler were found"),
        ("cuda", False, False, r"are missing \(not built\)\. Install torch and nvcc \(or"),
        ("mps", True, True, "there are no kernels for device type 'mps'"),
    ],
)
def test_explanation_gives_the_reason_for_the_backend(
    device_type, compiled, triton, reason, monkeypatch
):
    why_not = None if compiled else "not built"
    monkeypatch.setattr(backends, "_why_not_compiled", {"cpu": why_not, "cuda": why_not})
    monkeypatch.setattr(backends, "has_triton", lambda: triton)
    headline, device, dtype = explain_backend(device_type).splitlines()
    assert headline == choose_backend(device_type)
    assert device.startswith(f"  device {device_type}: ")
    assert re.search(reason, device)
    assert dtype == "  dtype torch.float32: computes in float32"


@pytest.mark.slow
def test_explanation_names_what_selected_the_backend(monkeypatch):
    with use_backend("reference"):
        with use_backend("compiled"):
            assert "cpu: selected by use_backend('compiled')" in explain_backend("cpu")
        assert explain_backend("cpu").startswith("reference\n")
        assert "cpu: selected by use_backend('reference')" in explain_backend("cpu")
    assert "selected" not in explain_backend("cpu")
    with use_backend("compiled"):
        explanation = explain_backend("mps")
    assert explanation.startswith("compiled, but the call would fail\n")
    assert "device mps: the backend 'compiled' was selected, but there are no" in explanation
    script = "import ops_dcnv4; print(ops_dcnv4.explain_backend('cpu'))"
    assert "selected by the environment variable OPS_DCNV4_BACKEND" in (
        run_with("reference", script).stdout
    )


@pytest.mark.parametrize(
    ("dtype", "explanation"),
    [
        (torch.float64, "computes in float64"),
        (torch.bfloat16, "computes and accumulates in float32"),
        (torch.int32, r"value must be floating point .* got torch\.int32"),
    ],
)
def test_explanation_covers_dtype_conversions(dtype, explanation):
    text = explain_backend("cpu", dtype)
    assert re.search(rf"dtype {dtype}: {explanation}$", text)
    assert text.startswith("compiled, but" if dtype == torch.int32 else "compiled\n")


def test_explanation_covers_autocast_and_interpolation_in_16_bits(monkeypatch):
    monkeypatch.setattr(backends, "_why_not_compiled", {"cpu": None, "cuda": None})
    monkeypatch.setattr(backends, "_LIBRARIES", {"cpu": "_C", "cuda": "_C"})
    assert "interpolate between pixels in float16" in explain_backend("cuda", torch.float16)
    assert "interpolate between pixels in bfloat16" in explain_backend("cuda", torch.bfloat16)
    assert "interpolate" not in explain_backend("cuda", torch.float32)
    assert "interpolate" not in explain_backend("cpu", torch.float16)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast converts to torch.bfloat16" in explain_backend("cpu")
        assert "autocast" not in explain_backend("cpu", torch.float64)
        assert "autocast" not in explain_backend("cuda")


@pytest.mark.parametrize(
    ("shape", "explanation"),
    [
        ((2, 5, 6, 8), "accepted; all shapes use the same backend"),
        (torch.Size((0, 5, 6, 8)), "accepted; there is nothing to compute"),
        ((5, 6, 8), r"value must be \(N, H, W, C\), or \(N, S, M, D\), got shape \(5, 6, 8\)"),
        ((2, 0, 6, 8), r"value must have at least one pixel, got shape \(2, 0, 6, 8\)"),
        ((2, 2**30, 6, 8), "each size of value must be at most 536870911, got 1073741824"),
    ],
)
def test_explanation_covers_shapes_that_fail(shape, explanation):
    text = explain_backend("cpu", torch.float32, shape)
    assert re.search(rf"shape {re.escape(str(tuple(shape)))}: {explanation}$", text)
    fails = text.startswith("compiled, but the call would fail\n")
    assert fails != text.startswith("compiled\n")
    value = torch.empty(shape, device="meta")
    size, batch = value.shape[1:3], value.shape[0]
    for call in (
        lambda: dcnv4(value, torch.empty(batch, *size, 27, device="meta")),
        lambda: flash_deform_attn(
            value, [(1, size[0])], None, torch.empty(batch, 1, size[1], 3, device="meta"), 1
        ),
    ):
        if not fails:
            call()
            continue
        with pytest.raises((ValueError, TypeError)):
            call()


def test_the_path_of_the_library_is_public(monkeypatch):
    assert library_path().name.startswith("_C.")
    assert library_path("cpu").is_file()
    with pytest.raises(RuntimeError, match="no kernels for device type 'mps'"):
        library_path("mps")
    monkeypatch.setattr(backends, "_why_not_compiled", {"cpu": "not built"})
    with pytest.raises(RuntimeError, match=r"kernels are missing \(not built\)"):
        library_path()


def test_meta_tensors_have_no_backend():
    assert explain_backend("meta").startswith("none\n  device meta: meta tensors have no data")


FORCED = """
import warnings; warnings.simplefilter("error")
import torch, ops_dcnv4
print(ops_dcnv4.choose_backend("cpu"), ops_dcnv4.is_compiled())
ops_dcnv4.dcnv4(torch.zeros(1, 3, 3, 2), torch.zeros(1, 3, 3, 27))
"""


def run_with(backend: str, script: str = FORCED) -> processes.Ended:
    return processes.run("-c", script, environment={backends.ENVIRONMENT_VARIABLE: backend})


@pytest.mark.slow
def test_environment_variable_forces_a_backend():
    assert is_compiled()
    result, unknown = run_with("reference"), run_with("fastest")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("reference True")
    assert "OPS_DCNV4_BACKEND" in unknown.stderr


@pytest.mark.slow
def test_selecting_missing_compiled_kernels_is_an_error():
    script = (
        "import sys; sys.modules['ops_dcnv4._C'] = None\n"
        "import torch, ops_dcnv4\n"
        "with ops_dcnv4.use_backend('compiled'):\n"
        "    ops_dcnv4.dcnv4(torch.zeros(1, 3, 3, 2), torch.zeros(1, 3, 3, 27))\n"
    )
    result = processes.run("-c", script)
    assert "the backend 'compiled' was selected, but the compiled kernels are missing" in (
        result.stderr
    )


@pytest.mark.parametrize(("compiler", "expected"), [("/usr/bin/gcc", True), (None, False)])
def test_triton_is_available_only_with_a_compiler(compiler, expected, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends.shutil, "which", lambda name: compiler)
    assert backends.has_triton.__wrapped__() == expected
