"""What the tests of several packages share."""

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def assert_near():
    """Assertion that tensors agree to a tolerance relative to the largest expected magnitude."""

    def check(actual: Tensor, expected: Tensor, tolerance: float) -> None:
        largest = expected.abs().max().item() if expected.numel() else 0.0
        actual = actual.detach().to(expected.dtype)
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * largest)

    return check
