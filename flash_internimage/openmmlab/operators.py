"""Provide mmcv's operators, also for modules of OpenMMLab that were imported before this package.

See :mod:`flash_internimage.mmcv_ops`. Modules that were imported without operators are repaired.
"""

import ast
import importlib
import importlib.util
import inspect
import sys
from types import ModuleType

import flash_internimage_startup


def _provide_operators() -> None:
    """Provide `mmcv._ext` if there is none, neither compiled nor since Python started."""
    if importlib.util.find_spec("mmcv._ext") is not None:
        return
    flash_internimage_startup.install()
    for package in ("mmcv.cnn.", "mmdet.", "mmseg."):
        for name in [name for name in sys.modules if name.startswith(package)]:
            _repeat_failed_imports(sys.modules[name])


def _repeat_failed_imports(module: ModuleType) -> None:
    """Replace the fallbacks of a module that was imported before `mmcv.ops` could be.

    OpenMMLab's modules define placeholders if they cannot import from `mmcv.ops`, or from modules
    that need it.
    """
    try:
        statements = ast.parse(inspect.getsource(module)).body
    except (OSError, TypeError):
        return  # not from a source file
    attempts = [part for node in statements if isinstance(node, ast.Try) for part in node.body]
    for node in attempts:
        if not isinstance(node, ast.ImportFrom):
            continue
        name = "." * node.level + (node.module or "")
        name = importlib.util.resolve_name(name, module.__package__)
        if not name.startswith(("mmcv.ops", "mmcv.cnn", "mmdet.models", "mmseg.models")):
            continue
        try:
            source = importlib.import_module(name)
        except ModuleNotFoundError:
            continue  # mmdet, which mmseg does not require
        for alias in node.names:
            name = alias.asname or alias.name
            fallback, found = getattr(module, name, None), getattr(source, alias.name)
            setattr(module, name, found)
            if isinstance(fallback, type) and fallback is not found:
                _rebase(module, fallback, found)


def _rebase(module: ModuleType, fallback: type, base: type) -> None:
    """Let the classes of a module inherit from `base` instead of `fallback`."""
    for value in vars(module).values():
        if isinstance(value, type) and fallback in value.__bases__ and value is not base:
            value.__bases__ = tuple(base if b is fallback else b for b in value.__bases__)


_provide_operators()
