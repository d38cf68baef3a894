import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_wheel_contains_every_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = [path.parent for path in (ROOT / "flash_internimage").rglob("__init__.py")]
    names = sorted(".".join(folder.relative_to(ROOT).parts) for folder in folders)
    assert settings["tool"]["setuptools"]["packages"] == names
