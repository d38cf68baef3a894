"""What concerns the installation and the CPU: threads, and life without compiled libraries."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ops_dcnv4 import is_compiled
from tests.ops_dcnv4.cases import DTYPES, Parameters, assert_equal, random_tensors, run_operator


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("dtype", DTYPES)
def test_number_of_threads_changes_nothing(dtype):
    p = Parameters(groups=3)
    tensors = random_tensors(p, batch=3, size=(13, 17), group_channels=16).to(dtype)
    torch.set_num_threads(1)
    expected = run_operator(tensors, p)
    for threads in (2, 3, 5, 8):
        torch.set_num_threads(threads)
        assert_equal(run_operator(tensors, p), expected)


WITHOUT_LIBRARY = """
import sys, warnings
sys.modules["ops_dcnv4._C"] = None
import torch, ops_dcnv4
assert not ops_dcnv4.is_compiled()
value, offset_mask, grad_output, parameters = torch.load(sys.argv[1])
inputs = value.requires_grad_(), offset_mask.requires_grad_()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        output = ops_dcnv4.dcnv4(*inputs, *parameters)
        grads = torch.autograd.grad(output, inputs, grad_output)
torch.save((output.detach(), *grads, [str(w.message) for w in caught]), sys.argv[2])
"""


def test_without_the_compiled_library(tmp_path, assert_near):
    p = Parameters(stride=(2, 1))
    tensors = random_tensors(p)
    torch.save((*tensors, tuple(p)), tmp_path / "inputs")
    script = [sys.executable, "-c", WITHOUT_LIBRARY, tmp_path / "inputs", tmp_path / "outputs"]
    subprocess.run(script, check=True)
    *result, messages = torch.load(tmp_path / "outputs")
    for actual, expected in zip(result, run_operator(tensors, p), strict=True):
        assert_near(actual, expected, 1e-12)
    (message,) = messages
    assert "slow PyTorch reference" in message
    assert "pip install --no-build-isolation" in message


def test_the_run_for_sanitizers_runs():
    command = [sys.executable, "-m", "tests.gpu.sanitize", "--device", "cpu"]
    subprocess.run(command, cwd=Path(__file__).parents[2], check=True)


def test_where_nvcc_is_the_cuda_kernels_are_compiled():
    can_compile = shutil.which("nvcc") is not None and torch.version.cuda is not None
    assert is_compiled("cuda") or not can_compile
