"""The operator's life with the rest of PyTorch, on tensors of a GPU."""

from tests.ops_dcnv4.test_registration import *  # noqa: F403  the same as on the CPU
