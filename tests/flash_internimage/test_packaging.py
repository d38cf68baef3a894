import importlib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("package", ["flash_internimage", "ops_dcnv4"])
def test_installed_version_equals_the_version_in_the_source(package):
    module = importlib.import_module(package)
    assert metadata.version(package.replace("_", "-")) == module.__version__
    assert f"\nversion: {module.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize(
    ("former", "current"),
    [
        ("classification.config", "classification.config"),
        ("classification.data", "classification.data"),
        ("classification.report", "classification.report"),
        ("flash_internimage.checkpoint", "checkpoints"),
        ("flash_internimage.conversion", "checkpoints.conversion"),
    ],
)
def test_former_module_names_are_aliases(former, current):
    module = importlib.import_module(former)
    assert module is importlib.import_module(f"flash_internimage.{current}")


def test_former_function_names_are_aliases():
    conversion = importlib.import_module("flash_internimage.conversion")
    assert conversion.restore_checkpoint is conversion.to_published_checkpoint
    assert conversion.restore_state_dict is conversion.to_published_state_dict
