"""Put the configs into the package, where OpenMMLab searches for them, and a hook next to it.

Everything else about the distribution is in pyproject.toml.
"""

import os
import shutil
from pathlib import Path
from typing import Any, ClassVar

from setuptools import Command, setup
from setuptools.command.build import build

_PACKAGE = Path("flash_internimage")
_SHIPPED = (Path("configs"), Path("model-index.yml"))
_SUFFIXES = {".py", ".yaml", ".yml"}
# Python executes this line when it starts; see flash_internimage_startup.py.
_STARTUP = (
    "import os; os.environ.get('FLASH_INTERNIMAGE_STARTUP') == '0' or "
    "__import__('flash_internimage_startup').install()\n"
)


class BuildConfigs(Command):
    """Copy the configs to `flash_internimage/.mim`, or link them for editable installations."""

    description = "add the configs to the package"
    user_options: ClassVar = [("build-lib=", "d", "folder of the built package")]

    def initialize_options(self) -> None:
        """Set the options that setuptools requires of the commands of a build."""
        self.build_lib: Any = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        """Take the folder from build_py, as other commands do."""
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def get_source_files(self) -> list[str]:
        """Return the files to include in a source distribution."""
        folders = (path.rglob("*") if path.is_dir() else [path] for path in _SHIPPED)
        files = (file for folder in folders for file in folder if file.suffix in _SUFFIXES)
        return sorted(file.as_posix() for file in files if file.is_file())

    def get_output_mapping(self) -> dict[str, str]:
        """Return the source of each file of a built package."""
        target = Path(self.build_lib, _PACKAGE, ".mim")
        return {str(target / file): file for file in self.get_source_files()}

    def get_outputs(self) -> list[str]:
        """Return the files of a built package."""
        return list(self.get_output_mapping())

    def run(self) -> None:
        """Copy the files, or link the folder next to the code from which an editable one runs."""
        if self.editable_mode:
            _link(_PACKAGE / ".mim")
            return
        shutil.rmtree(Path(self.build_lib, _PACKAGE, ".mim"), ignore_errors=True)
        for target, source in self.get_output_mapping().items():
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


class BuildStartup(Command):
    """Write `flash_internimage.pth`, also into editable installations."""

    description = "add the hook that runs when Python starts"
    user_options: ClassVar = [("build-lib=", "d", "folder of the built package")]

    def initialize_options(self) -> None:
        """Set the options that setuptools requires of the commands of a build."""
        self.build_lib: Any = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        """Take the folder from build_py; an editable wheel has nothing but what is installed."""
        source, folder = "build_py", "build_lib"
        if self.editable_mode:
            source, folder = "install", "install_lib"
        self.set_undefined_options(source, (folder, "build_lib"))

    def get_source_files(self) -> list[str]:
        """Return no files: the line is part of this script."""
        return []

    def get_output_mapping(self) -> dict[str, str]:
        """Return no sources."""
        return {}

    def get_outputs(self) -> list[str]:
        """Return the file."""
        return [os.path.join(self.build_lib, f"{_PACKAGE}.pth")]

    def run(self) -> None:
        """Write the file."""
        Path(self.build_lib, f"{_PACKAGE}.pth").write_text(_STARTUP)


def _link(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in _SHIPPED:
        target = folder / path.name
        try:
            target.symlink_to(os.path.relpath(path, folder), target_is_directory=path.is_dir())
        except OSError:  # Windows reserves symbolic links for developers and administrators.
            shutil.copytree(path, target) if path.is_dir() else shutil.copyfile(path, target)


build.sub_commands += [("build_configs", None), ("build_startup", None)]
setup(cmdclass={"build_configs": BuildConfigs, "build_startup": BuildStartup})
