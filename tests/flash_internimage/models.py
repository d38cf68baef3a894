"""Small models for tests."""

import pytest
import timm
import torch
from torch import Tensor

from flash_internimage import FlashInternImage

SMALL = {"channels": 16, "depths": (1, 1, 1, 1), "groups": (1, 2, 4, 8), "num_classes": 10}
POST_NORM = {
    "post_norm": True,
    "layer_scale": 0.5,
    "dw_kernel_size": 3,
    "offset_scale": 0.5,
    "dcn_output_bias": True,
    "mlp_fc2_bias": True,
}
STYLES = pytest.mark.parametrize("style", [{}, POST_NORM], ids=["pre_norm", "post_norm"])


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def nano(seed: int, **kwargs) -> FlashInternImage:
    torch.manual_seed(seed)
    return timm.create_model("flash_internimage_nano", **kwargs)


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    assert all(actual[name].equal(expected[name]) for name in expected)


def split_head(state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    head = {name: tensor for name, tensor in state_dict.items() if name.startswith("head.")}
    return head, {name: tensor for name, tensor in state_dict.items() if name not in head}
