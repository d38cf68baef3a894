"""Run the operators' kernels on small inputs, for NVIDIA's compute-sanitizer.

compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.gpu.sanitize
"""

import argparse
import itertools
import os

# Allocate each tensor separately, so that accesses outside of it do not reach another.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch

import ops_dcnv4  # noqa: F401  defines the operators
from tests.cuda_model.attention_cases import small_cases as small_cases_of_attention
from tests.ops_dcnv4.attention_cases import FORMS, run_reference
from tests.ops_dcnv4.cases import small_cases


def main(device: str) -> None:
    operators, before = torch.ops.ops_dcnv4, torch.are_deterministic_algorithms_enabled()
    for p, tensors in small_cases():
        value, offset_mask, grad_output = tensors.to(device)
        results = [operators.dcnv4(value, offset_mask, *p)]
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic)
            results += operators.dcnv4_backward(grad_output, value, offset_mask, *p)
            torch.use_deterministic_algorithms(before)
        # Read everything that should have been written.
        assert all(result.isfinite().all() for result in results)
    for inputs in small_cases_of_attention():
        for deterministic, form in itertools.product((False, True), FORMS):
            torch.use_deterministic_algorithms(deterministic)
            results = run_reference(inputs.on(device), form, operators)
            torch.use_deterministic_algorithms(before)
            assert all(result.isfinite().all() for result in results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    main(parser.parse_args().device)
