"""Load outputs and configs of the published detectors and segmentors."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from flash_internimage.checkpoints import load_checkpoint
from flash_internimage.cli import zoo

DATA = Path(__file__).parents[2] / "data" / "openmmlab"


@cache
def arrays(name: str) -> dict[str, Tensor]:
    with np.load(DATA / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


@cache
def converted(folder: str) -> dict[str, Tensor]:
    """Return the weights of a published checkpoint as converted by the zoo's command."""
    with TemporaryDirectory() as out:
        published, current = Path(out, "published.pth"), Path(out, "current.pth")
        meta = {"CLASSES": ("a", "b"), "config": SimpleNamespace(), "epoch": 12}
        torch.save({"meta": meta, "state_dict": arrays(f"{folder}/state_dict")}, published)
        assert zoo.main(["convert", str(published), "-o", str(current)]) == 0
        return load_checkpoint(current)["state_dict"]


def published_config(folder: str) -> dict:
    return json.loads((DATA / folder / "config.json").read_text())["model"]


def backbone_config(published: dict) -> dict:
    """Return the published backbone config without the settings shared by all models."""
    assert published["core_op"] == "DCNv4"
    assert published["norm_layer"] == "LN"
    return {key: value for key, value in published.items() if key not in ("core_op", "norm_layer")}


def assert_published(actual: dict[str, Tensor], folder: str) -> None:
    """Check that the arrays are exactly those of the published code, within their tolerances."""
    expected = arrays(f"{folder}/outputs")
    figures = json.loads((DATA / folder / "meta.json").read_text())["outputs"]
    assert sorted(actual) == sorted(expected)
    for name, tensor in actual.items():
        tolerance = figures[name].get("suggested_atol", 0)
        assert (tolerance > 0) == expected[name].is_floating_point(), name
        torch.testing.assert_close(
            tensor, expected[name], rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )
