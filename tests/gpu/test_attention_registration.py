"""Deformable attention's life with the rest of PyTorch, on tensors of a GPU."""

from tests.ops_dcnv4.test_attention_registration import *  # noqa: F403  the same as on the CPU
