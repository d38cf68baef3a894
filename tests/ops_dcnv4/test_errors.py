"""Errors that name the argument, and what must not lead to a crash."""

import subprocess
import sys

import pytest
import torch

from ops_dcnv4 import dcnv4

VALUE, OFFSET_MASK = torch.zeros(2, 5, 6, 8), torch.zeros(2, 5, 6, 56)
ERRORS = [
    ({"value": [1.0]}, TypeError, "value must be a tensor"),
    ({"offset_mask": None}, TypeError, "offset_mask must be a tensor"),
    ({"value": VALUE[0]}, ValueError, "value must be .N, H, W, C.*5, 6, 8"),
    ({"offset_mask": OFFSET_MASK[0]}, ValueError, "offset_mask must be .N, H, W, C"),
    ({"value": VALUE.int()}, TypeError, "value must be floating point"),
    ({"offset_mask": OFFSET_MASK.int()}, TypeError, "offset_mask must be floating point"),
    ({"value": VALUE.to(torch.complex64)}, TypeError, "value must be floating point"),
    ({"offset_mask": OFFSET_MASK.to("meta")}, ValueError, "value and offset_mask.*one device"),
    ({"offset_mask": OFFSET_MASK.double()}, TypeError, "value and offset_mask.*one dtype"),
    (
        {"value": VALUE.to("meta"), "offset_mask": OFFSET_MASK.double().to("meta")},
        TypeError,
        "value and offset_mask.*one dtype",
    ),
    ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1, got 0"),
    ({"stride": (1, 0)}, ValueError, "stride must be at least 1"),
    ({"padding": -1}, ValueError, "padding must be at least 0"),
    ({"dilation": 0}, ValueError, "dilation must be at least 1"),
    ({"kernel_size": 3.0}, TypeError, "kernel_size must be an int or a pair"),
    ({"stride": (1, 2, 3)}, TypeError, "stride must be an int or a pair"),
    ({"padding": "same"}, TypeError, "padding must be an int or a pair"),
    ({"dilation": None}, TypeError, "dilation must be an int or a pair"),
    ({"groups": 2.0}, TypeError, "groups must be an int"),
    ({"groups": 0}, ValueError, "groups must be positive"),
    ({"groups": 3}, ValueError, r"groups must .* divide the channels of value \(8\), got 3"),
    ({"kernel_size": 9}, ValueError, "output would be -1 x 0.*kernel_size"),
    ({"value": VALUE[:1]}, ValueError, r"offset_mask must be \(1, 5, 6"),
    ({"stride": 2}, ValueError, r"offset_mask must be \(2, 3, 3"),
    ({"offset_mask": OFFSET_MASK[..., :53]}, ValueError, "offset_mask .*at least 54 channels"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
def test_wrong_argument_is_named(change, error, message):
    arguments = {"value": VALUE, "offset_mask": OFFSET_MASK, "groups": 2} | change
    with pytest.raises(error, match=message):
        dcnv4(**arguments)


# In a process of its own, where a crash is a failure and no more.
UNSAFE = """
import torch, ops_dcnv4
value, offset_mask = torch.zeros(1, 5, 5, 4), torch.zeros(1, 5, 5, 27)
ones = [[1, 1]] * 4
half_pairs = [[*ones[:i], [1], *ones[i + 1 :]] for i in range(4)]
overflowing_taps = [[[2**16, 2**16], *ones[1:]]]
for pairs in half_pairs + overflowing_taps:
    try:
        torch.ops.ops_dcnv4.dcnv4(value, offset_mask, *pairs, 1, 1.0, False)
    except ValueError:
        continue
    raise SystemExit(f"accepted {pairs}")
"""


def test_kernels_survive_half_a_pair_and_overflow():
    subprocess.run([sys.executable, "-c", UNSAFE], check=True)
