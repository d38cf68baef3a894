import importlib
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import flash_internimage_cli
from flash_internimage.extras import EXTRAS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Requirements of the distribution without extras, and of each extra.
REQUIRED = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
PINNED = {
    "requirements.txt": ["", "train"],
    "requirements-openmmlab.txt": ["openmmlab"],
    "requirements-dev.txt": ["app", "dev", "diffusion"],
}


def requirements(lines) -> dict[str, Requirement]:
    lines = (line.partition("#")[0].strip() for line in lines)
    parsed = (Requirement(line) for line in lines if line and not line.startswith("-"))
    return {requirement.name.replace("_", "-").lower(): requirement for requirement in parsed}


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


@pytest.mark.parametrize("file", PINNED)
def test_the_tested_versions_are_accepted_by_the_extras(file):
    pins = requirements((ROOT / file).read_text().splitlines())
    extras = requirements(line for extra in PINNED[file] for line in REQUIRED[extra])
    assert extras.keys() - {"flash-internimage", "ops-dcnv4"} <= pins.keys()
    for name, requirement in extras.items():
        [pin] = pins[name].specifier if name in pins else [None]
        assert pin is None or requirement.specifier.contains(pin.version), name


@pytest.mark.parametrize(
    "extra",
    [pytest.param(e, marks=pytest.mark.mm if e == "openmmlab" else ()) for e in EXTRAS],
)
def test_missing_packages_are_attributed_to_an_extra_that_contains_them(extra):
    distributions = metadata.packages_distributions()
    required = requirements(REQUIRED[extra]).keys()
    for package in EXTRAS[extra]:
        names = distributions.get(package, [package])  # if it is not installed
        assert required & {name.lower() for name in names}, package


def test_the_console_program_is_installed():
    assert PROJECT["scripts"] == {"flash-internimage": "flash_internimage_cli:main"}
    [script] = metadata.entry_points(group="console_scripts", name="flash-internimage")
    assert script.load() is flash_internimage_cli.main
