"""Tests of threads in the CPU kernels, and of installations without compiled libraries."""

import os
import shutil

import pytest
import torch

from ops_dcnv4 import is_compiled
from tests import processes
from tests.ops_dcnv4 import attention_cases
from tests.ops_dcnv4.cases import DTYPES, Parameters, assert_equal, random_tensors, run_operator


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(dtype):
    p = Parameters(groups=3)
    tensors = random_tensors(p, batch=3, size=(13, 17), group_channels=16).to(dtype)
    torch.set_num_threads(1)
    expected = run_operator(tensors, p)
    for threads in (2, 3, 5, 8):
        torch.set_num_threads(threads)
        assert_equal(run_operator(tensors, p), expected)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_does_not_depend_on_the_number_of_threads(dtype):
    inputs = attention_cases.random_inputs(queries=700, head_channels=32, batch=3).to(dtype)
    torch.set_num_threads(1)
    expected = attention_cases.run_operator(inputs, "fused")
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert_equal(attention_cases.run_operator(inputs, "fused"), expected)


WITHOUT_LIBRARY = """
import sys, warnings
sys.modules["ops_dcnv4._C"] = None
import torch, ops_dcnv4
assert not ops_dcnv4.is_compiled()
assert torch.ops.ops_dcnv4.dcnv4.default._defined_in_python
value, offset_mask, grad_output, parameters = torch.load(sys.argv[1])
inputs = value.requires_grad_(), offset_mask.requires_grad_()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        output = ops_dcnv4.dcnv4(*inputs, *parameters)
        grads = torch.autograd.grad(output, inputs, grad_output)
torch.save((output.detach(), *grads, [str(w.message) for w in caught]), sys.argv[2])
"""

ATTENTION_WITHOUT_LIBRARY = """
import sys, warnings
sys.modules["ops_dcnv4._C"] = None
import torch, ops_dcnv4
from tests.ops_dcnv4 import attention_cases
warnings.simplefilter("ignore")
inputs = attention_cases.Inputs(*torch.load(sys.argv[1]))
results = [attention_cases.run_operator(inputs, form) for form in attention_cases.FORMS]
with torch.autocast("cpu", torch.bfloat16):
    output = attention_cases.call(inputs.to(torch.float32), "split")
torch.save((*map(tuple, results), output), sys.argv[2])
"""


@pytest.mark.slow
def test_without_the_compiled_library(tmp_path, assert_near):
    p = Parameters(stride=(2, 1))
    tensors = random_tensors(p)
    torch.save((*tensors, tuple(p)), tmp_path / "inputs")
    processes.run("-c", WITHOUT_LIBRARY, tmp_path / "inputs", tmp_path / "outputs").checked()
    *result, messages = torch.load(tmp_path / "outputs")
    for actual, expected in zip(result, run_operator(tensors, p), strict=True):
        assert_near(actual, expected, 1e-12)
    (message,) = messages
    assert "slow PyTorch reference" in message
    assert "pip install --no-build-isolation" in message


@pytest.mark.slow
def test_attention_without_the_compiled_library(tmp_path, assert_near):
    inputs = attention_cases.random_inputs()
    torch.save(tuple(inputs), tmp_path / "inputs")
    paths = [tmp_path / "inputs", tmp_path / "outputs"]
    processes.run("-c", ATTENTION_WITHOUT_LIBRARY, *paths).checked()
    *results, under_autocast = torch.load(tmp_path / "outputs")
    for form, result in zip(attention_cases.FORMS, results, strict=True):
        expected = attention_cases.run_operator(inputs, form)
        for a, e in zip(result, expected, strict=True):
            assert_near(a, e, 1e-12)
    rounded = inputs.to(torch.bfloat16, points=torch.float32)
    expected = attention_cases.run_operator(rounded, "split").output
    assert under_autocast.dtype == torch.bfloat16
    assert_near(under_autocast.float(), expected.float(), 1e-2)


def test_cuda_kernels_are_compiled_where_nvcc_is_installed():
    can_compile = shutil.which("nvcc") is not None and torch.version.cuda is not None
    can_compile &= os.environ.get("FORCE_CPU") != "1"
    assert is_compiled("cuda") or not can_compile
