"""Tests of DCNv4 with torch.library, torch.compile, torch.export and autocast on a GPU."""

from tests.ops_dcnv4.test_registration import *  # noqa: F403  the same as on the CPU
