"""Tests of deformable attention with torch.library, torch.compile and torch.export on a GPU."""

from tests.ops_dcnv4.test_attention_registration import *  # noqa: F403  the same as on the CPU
