"""Build the wheels of both packages into a folder.

    python -m tools.build_wheels [--dist dist]

Wheels of ops_dcnv4 are built and repaired with the settings in [tool.cibuildwheel] of
ops_dcnv4/pyproject.toml, which cibuildwheel uses for the published ones. They contain the CUDA
library if setup.py finds nvcc; FORCE_CPU=1 leaves it out. Compile errors are fatal.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PLATFORM = {"darwin": "macos", "win32": "windows"}.get(sys.platform, "linux")


def read_settings(platform: str = PLATFORM) -> dict[str, Any]:
    """Return cibuildwheel's settings for a platform: "linux", "macos" or "windows"."""
    with (ROOT / "ops_dcnv4" / "pyproject.toml").open("rb") as file:
        settings = tomllib.load(file)["tool"]["cibuildwheel"]
    return settings | settings.get(platform, {})


def build_wheel(package: Path, folder: Path, environment: dict[str, str]) -> Path:
    """Build the wheel of a package with the installed build tools, and return its path."""
    # setuptools packs whatever earlier builds left there.
    for stale in (package / "build").glob("lib*"):
        shutil.rmtree(stale)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command = [*pip, "--wheel-dir", str(folder), str(package)]
    subprocess.run(command, check=True, env=_tools_on_path() | environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def repair_wheel(wheel: Path, dist: Path, command: str) -> None:
    """Run cibuildwheel's repair command, which checks the libraries that a wheel links to."""
    if not command:
        shutil.copy(wheel, dist)
        return
    words = [word.format(wheel=wheel, dest_dir=dist) for word in shlex.split(command)]
    subprocess.run(words, check=True, env=_tools_on_path())


def _tools_on_path() -> dict[str, str]:
    """Return the environment variables, with the programs of this Python environment on PATH."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    return os.environ | {"PATH": path}


def main() -> None:
    """Build both wheels, which replace those in the folder."""
    parser = argparse.ArgumentParser(description="Build the wheels of both packages.")
    parser.add_argument("--dist", type=Path, default=Path("dist"), help="default: %(default)s")
    dist: Path = parser.parse_args().dist
    dist.mkdir(parents=True, exist_ok=True)
    for name in ("ops_dcnv4", "flash_internimage"):
        for old in dist.glob(f"{name}-*.whl"):
            old.unlink()
    settings = read_settings()
    with tempfile.TemporaryDirectory() as folder:
        wheel = build_wheel(ROOT / "ops_dcnv4", Path(folder), settings["environment"])
        repair_wheel(wheel, dist, settings.get("repair-wheel-command", ""))
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(build_wheel(ROOT, Path(folder), {}), dist)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"failed: {shlex.join(error.cmd)}")
