"""Build backend: setuptools, and a PyTorch to compile the kernels against.

An isolated build does not see the packages of the environment it installs into. If that environment
has PyTorch, its folders are added to the path. If not, PyTorch becomes a build requirement, so that
the kernels are also compiled when everything is installed at once, into an empty environment.
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

# Prints the path and PyTorch's version, if it is installed.
_LOOK = """
import importlib.metadata, json, sys
try:
    print(json.dumps([sys.path, importlib.metadata.version("torch")]))
except importlib.metadata.PackageNotFoundError:
    print("null")
"""


def _path_of_torch() -> list[str] | None:
    """Return the module path of the target environment, or None if it has no suitable PyTorch."""
    # -E ignores the variables with which pip isolates builds.
    command = [sys.executable, "-E", "-c", _LOOK]
    found = json.loads(
        subprocess.run(command, cwd=os.sep, stdout=subprocess.PIPE, check=True).stdout
    )
    if found is None or tuple(map(int, found[1].split(".")[:2])) < OLDEST:
        return None
    return found[0]


def _requirements() -> list[str]:
    return [] if _path_of_torch() else ["torch>={}.{}".format(*OLDEST)]


def _add_target() -> None:
    for folder in _path_of_torch() or ():
        site.addsitedir(folder)


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Return what building a wheel needs."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_requirements()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """Return what an editable installation needs."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_requirements()]


def build_wheel(folder: str, config_settings: Any = None, metadata: str | None = None) -> str:
    """Build a wheel."""
    _add_target()
    return build_meta.build_wheel(folder, config_settings, metadata)


def build_editable(folder: str, config_settings: Any = None, metadata: str | None = None) -> str:
    """Build an editable wheel."""
    _add_target()
    return build_meta.build_editable(folder, config_settings, metadata)
