"""Tests of the build backend of ops_dcnv4, as pip runs it: isolated, with the target's Python."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOOKS = (
    "import json, sys, build_backend as b\n"
    "print(json.dumps([b.get_requires_for_build_wheel(), b.get_requires_for_build_editable(),"
    " b.get_requires_for_build_sdist(), sys.path]))"
)


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    """Create an empty environment and return its folder."""
    folder = tmp_path_factory.mktemp("target")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder


@pytest.fixture
def packages(target) -> Path:
    return Path(sysconfig.get_path("purelib", "venv", {"base": target, "platbase": target}))


@pytest.fixture
def hooks(target, tmp_path):
    """Return a function that calls the hooks, with only setuptools importable."""

    def hooks() -> list[list[str]]:
        for name in ("setuptools", "_distutils_hack"):
            (tmp_path / name).symlink_to(Path(sysconfig.get_path("purelib"), name))
        python = Path(sysconfig.get_path("scripts", "venv", {"base": target}), "python")
        paths = os.pathsep.join([str(ROOT / "ops_dcnv4"), str(tmp_path)])
        done = subprocess.run(
            [python, "-c", HOOKS], cwd=ROOT / "ops_dcnv4", capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return hooks


@pytest.fixture
def install(packages) -> Iterator[Callable[[str], None]]:
    """Return a function that installs the metadata of a version of torch."""
    folders = []

    def install(version: str) -> None:
        folders.append(packages / f"torch-{version}.dist-info")
        folders[-1].mkdir()
        (folders[-1] / "METADATA").write_text(f"Name: torch\nVersion: {version}\n")

    yield install
    for folder in folders:
        shutil.rmtree(folder)


@pytest.mark.parametrize("version", [None, "2.10.0"])
def test_torch_is_required_where_there_is_none_or_an_old_one(version, hooks, install):
    if version:
        install(version)
    wheel, editable, sdist, _ = hooks()
    assert wheel == editable == ["torch>=2.11"]
    assert sdist == []


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "3.0.0a0+git1234"])
def test_torch_of_the_target_is_used(version, hooks, install, packages):
    install(version)
    *required, path = hooks()
    assert required == [[], [], []]
    # What the build requires takes precedence over the packages of the target.
    assert path.index(str(ROOT / "ops_dcnv4")) < path.index(str(packages))
