"""Build backend: setuptools, with a PyTorch to compile the kernels against.

An isolated build does not see the packages of the environment that it installs into. If PyTorch is
among them, their folders are added to the path. If not, PyTorch becomes a build requirement, so
that installing everything at once into an empty environment compiles the kernels as well.
"""

import json
import os
import site
import subprocess
import sys
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

OLDEST = (2, 11)

# Prints the module path and PyTorch's version, if it is installed.
_LOOK = """
import importlib.metadata, json, sys
try:
    print(json.dumps([sys.path, importlib.metadata.version("torch")]))
except importlib.metadata.PackageNotFoundError:
    print("null")
"""


def _path_of_torch() -> list[str]:
    """Return the module path of the target environment, or nothing if it has no suitable torch."""
    # -E ignores the variables with which pip isolates builds, -P the current folder.
    command = [sys.executable, "-E", "-P", "-c", _LOOK]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    path, version = json.loads(output) or ([], "0.0")
    return path if tuple(map(int, version.split(".")[:2])) >= OLDEST else []


_PATH = _path_of_torch()
for _folder in _PATH:
    site.addsitedir(_folder)


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Return the requirements that pyproject.toml does not list."""
    return [] if _PATH else ["torch>={}.{}".format(*OLDEST)]


get_requires_for_build_editable = get_requires_for_build_wheel


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    """Return no requirements: nothing is compiled."""
    return []


def build_sdist(folder: str, config_settings: Any = None) -> str:
    """Write a source distribution, also without PyTorch."""
    os.environ.pop("OPS_DCNV4_REQUIRE_COMPILED", None)
    return build_meta.build_sdist(folder, config_settings)
