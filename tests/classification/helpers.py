"""Helpers of the classification tests."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flash_internimage.checkpoints import load_checkpoint
from flash_internimage.classification.config import Config
from flash_internimage.classification.engine import Trainer
from flash_internimage.classification.model import pick_device

CPU = torch.device("cpu")
SMALL = {"channels": 16, "depths": [1, 1, 1, 1], "groups": [1, 2, 4, 8]}
EPOCHS = {"epochs": 4, "warmup_epochs": 1}


def build(cfg: Config) -> Trainer:
    """Build a trainer that is about to resume."""
    return Trainer(cfg, pick_device(cfg.device), load_initial=False)


def metrics(output: str | Path) -> list[dict[str, str]]:
    """Read metrics.csv without the measured speed."""
    with open(Path(output) / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def assert_same_weights(a: str | Path, b: str | Path) -> None:
    """Compare the weights and EMA weights of two checkpoints bit for bit."""
    one, other = load_checkpoint(a), load_checkpoint(b)
    for part in ("model", "model_ema"):
        assert one[part].keys() == other[part].keys()
        differing = [k for k in one[part] if not torch.equal(one[part][k], other[part][k])]
        assert differing == []


def assert_equal(a: Any, b: Any) -> None:
    """Compare contents of checkpoints bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), list(b.values())
    if isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def without_batch_norm(build_model: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Wrap `build_model`: results of its models do not depend on how images share batches."""

    def build(*arguments: Any) -> nn.Module:
        model = build_model(*arguments)
        model.conv_head[1] = nn.Identity()
        return model

    return build
