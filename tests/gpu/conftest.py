"""Fixtures of the tests that need a GPU; without one, their modules are skipped."""

from pathlib import Path

import pytest
import torch


class ModuleWithoutGPU(pytest.Module):
    def collect(self):
        super().collect()
        pytest.skip("needs a GPU with CUDA", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector):
    if not torch.cuda.is_available():
        return ModuleWithoutGPU.from_parent(parent, path=module_path)
    return None


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda"
