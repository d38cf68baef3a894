"""Provide what OpenMMLab's own programs look for before they import this package.

mmdet's and mmseg's scripts read configs, and import mmcv's operators, before they import what a
config names. An installation contains a `.pth` file that calls :func:`install` when Python starts,
unless the environment variable `FLASH_INTERNIMAGE_STARTUP` is 0. This module is not part of the
package, because importing that imports PyTorch, and itself imports nothing before it is needed.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


class OperatorsFinder:
    """Find torchvision's operators for an mmcv without compiled ones, after all other finders."""

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Return the spec of `mmcv._ext`, and None for all other modules."""
        if name != "mmcv._ext":
            return None
        from importlib.machinery import ModuleSpec

        return ModuleSpec(name, self)  # type: ignore[arg-type]

    def create_module(self, spec: "ModuleSpec") -> "ModuleType":
        """Return the operators."""
        from flash_internimage.mmcv_ops import Operators

        return Operators()

    def exec_module(self, module: "ModuleType") -> None:
        """Leave the module as it is."""


class ConfigsFinder:
    """Let mmengine know the prefix `flash_internimage::` as soon as it can read configs."""

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Return the spec of mmengine's module, with an addition, and None for all others."""
        if name != "mmengine.config.utils":
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_add(module: "ModuleType") -> None:
                execute(module)
                packages = getattr(module, "MODULE2PACKAGE", {})  # other modules share some loaders
                packages.setdefault("flash_internimage", "flash_internimage")

            spec.loader.exec_module = execute_and_add  # type: ignore[method-assign]
        return spec


_OPERATORS = OperatorsFinder()
_CONFIGS = ConfigsFinder()


def install() -> None:
    """Add the finders to Python's, once."""
    if _CONFIGS not in sys.meta_path:
        sys.meta_path.insert(0, _CONFIGS)
    if _OPERATORS not in sys.meta_path:
        sys.meta_path.append(_OPERATORS)
