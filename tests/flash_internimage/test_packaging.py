import importlib
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_a_wheel_contains_every_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = [path.parent for path in (ROOT / "flash_internimage").rglob("__init__.py")]
    names = sorted(".".join(folder.relative_to(ROOT).parts) for folder in folders)
    assert settings["tool"]["setuptools"]["packages"] == names


@pytest.mark.parametrize(
    ("former", "current"),
    [("config", "config"), ("data", "data"), ("datasets", "data.datasets"), ("state", "state")],
)
def test_former_names_are_the_same_modules(former, current):
    module = importlib.import_module(f"classification.{former}")
    assert module is importlib.import_module(f"flash_internimage.classification.{current}")
