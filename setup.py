"""Put the configs into the package, where OpenMMLab searches for them.

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


def _link(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in _SHIPPED:
        target = folder / path.name
        try:
            target.symlink_to(os.path.relpath(path, folder), target_is_directory=path.is_dir())
        except OSError:  # Windows reserves symbolic links for developers and administrators.
            shutil.copytree(path, target) if path.is_dir() else shutil.copyfile(path, target)


build.sub_commands.append(("build_configs", None))
setup(cmdclass={"build_configs": BuildConfigs})
