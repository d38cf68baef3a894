"""Test the hook that runs when Python starts; `tests/packaging` tests it with OpenMMLab."""

import subprocess
import sys
from pathlib import Path

import flash_internimage_startup

PROGRAM = """
import sys
modules, finders = set(sys.modules), list(sys.meta_path)
import flash_internimage_startup
for _ in range(2):
    flash_internimage_startup.install()
assert set(sys.modules) - modules == {"flash_internimage_startup"}
assert sys.meta_path[1:-1] == finders
assert not any(finder.find_spec("mmengine") for finder in (sys.meta_path[0], sys.meta_path[-1]))
"""


def test_the_hook_imports_nothing_and_is_installed_once():
    folder = Path(flash_internimage_startup.__file__).parent
    subprocess.run([sys.executable, "-S", "-c", PROGRAM], cwd=folder, check=True)
