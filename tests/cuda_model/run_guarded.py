"""Run the emulated CUDA kernels with a guard region next to every tensor.

Run it as a separate process: `python -m tests.cuda_model.run_guarded before` or `after` places the
guard region before or after each tensor. An access to it ends the process, and the last line of
output names the case. If the kernels make no such access, the script makes one itself to verify
that the guard works.
"""

import contextlib
import ctypes
import itertools
import sys

import torch

from tests.cuda_model.attention_cases import FOUR_LEVELS, levels_outside_of_value
from tests.cuda_model.attention_cases import small_cases as small_cases_of_attention
from tests.cuda_model.build import load_operators
from tests.ops_dcnv4.attention_cases import FORMS, random_inputs, run_reference
from tests.ops_dcnv4.cases import small_cases

LAST = "one byte too far"


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def run_with_error(operator, *arguments) -> None:
    with contextlib.suppress(RuntimeError):  # test_attention.py tests the message
        operator(*arguments)


def main(where: str) -> None:
    torch.set_num_threads(1)
    load_operators()
    operators = torch.ops.ops_dcnv4_cuda_model
    operators.guard_tensors(where == "before")
    for p, (value, offset_mask, grad_output) in small_cases():
        say(f"value {tuple(value.shape)}, {value.dtype}, {p}")
        operators.dcnv4(value, offset_mask, *p)
        for deterministic in (False, True):
            operators.dcnv4_backward(
                grad_output, value, offset_mask, *p, deterministic=deterministic
            )
    for inputs in small_cases_of_attention():
        say(f"attention: value {tuple(inputs.value.shape)}, {inputs.value.dtype}")
        for deterministic, form in itertools.product((False, True), FORMS):
            run_reference(inputs, form, operators, deterministic=deterministic)
    for levels in levels_outside_of_value():
        for dtype in (torch.float32, torch.float64):  # specialized and generic kernels
            say(f"levels outside of value: {levels}, {dtype}")
            inputs = random_inputs(FOUR_LEVELS, points=4, head_channels=16).to(dtype)
            arguments = inputs.value, *levels, *inputs[3:5]
            run_with_error(operators.ms_deform_attn, *arguments)
            run_with_error(operators.ms_deform_attn_backward, inputs.grad_output, *arguments)
    say(LAST)
    memory = torch.zeros(4096, dtype=torch.uint8)
    outside = memory.data_ptr() + (-1 if where == "before" else len(memory))
    ctypes.string_at(outside, 1)


if __name__ == "__main__":
    main(sys.argv[1])
