"""The scope of configs with a base such as `flash_internimage::detection/...`.

mmengine imports this module to build the parts of such configs. Their types are those of mmdet or
mmseg, and everything that this package registers in mmengine's root registries.
"""

import sys

import mmengine.registry
from mmengine.registry import DefaultScope, Registry

from .checkpoints.zoo import TASKS

_SCOPE = __name__.partition(".")[0]
# The module that the configs of each library import.
_LIBRARIES = {library: f"{_SCOPE}.openmmlab.{task}" for library, task in TASKS.items()}


def _library() -> str:
    """Return the library in whose scope this package's scope is used."""
    scopes = [instance.scope_name for instance in DefaultScope._instance_dict.values()]
    for scope in reversed(scopes):
        if scope in _LIBRARIES:
            return scope
    imported = [library for library, module in _LIBRARIES.items() if module in sys.modules]
    if len(imported) == 1:
        return imported[0]
    raise RuntimeError(
        f"default_scope must be mmdet or mmseg to build a config of {_SCOPE}, got {scopes}"
    )


class LibraryRegistry(Registry):
    """Registry without own entries, which finds those of mmdet or mmseg and of mmengine."""

    def get(self, key: str) -> type | None:
        """Return the entry of the registry for the current task.

        Raises:
            RuntimeError: If neither mmdet nor mmseg is the scope of the task.
        """
        root = self.root
        with root.switch_scope_and_registry(_library()) as registry:
            return registry.get(key)


for _root in list(vars(mmengine.registry).values()):
    if isinstance(_root, Registry) and _SCOPE not in _root.children:
        LibraryRegistry(_root.name, parent=_root, scope=_SCOPE)
