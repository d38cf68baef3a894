"""Models whose layers sample away from the regular grid, and an image."""

import numpy as np
import pytest
import torch

from flash_internimage import FlashInternImage
from ops_dcnv4.modules.common import reset_offset_mask
from tests.flash_internimage.models import nano


@pytest.fixture(autouse=True)
def one_thread_each(one_thread) -> None:
    """Use one thread in every test of this folder."""


@pytest.fixture(scope="package")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)


@pytest.fixture
def model() -> FlashInternImage:
    """Return nano with random offsets of about a pixel."""
    model = nano(0).eval()
    for stage in model.levels:
        for block in stage.blocks:
            torch.nn.init.normal_(block.dcn.offset_mask.weight, std=0.1)
            torch.nn.init.normal_(block.dcn.offset_mask.bias, std=0.5)
    return model


@pytest.fixture
def regular() -> FlashInternImage:
    """Return nano that samples the regular grid with modulation 1."""
    model = nano(0).eval()
    for stage in model.levels:
        for block in stage.blocks:
            reset_offset_mask(block.dcn.offset_mask, block.dcn.group, block.dcn.taps, 1.0)
    return model
