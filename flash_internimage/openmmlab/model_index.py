"""The configs and models of this package under their names in mmengine.

Importing this module makes `flash_internimage::` a prefix of configs, for `_base_` and
`mmengine.hub`, and lets the inferencers of mmdet and mmseg find models of the zoo by name.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

from mmengine.config.utils import MODULE2PACKAGE
from mmengine.infer import BaseInferencer

from ..checkpoints.zoo import TASKS, read_zoo

_PACKAGE = __name__.partition(".")[0]


def _models(task: str) -> Iterator[dict[str, Any]]:
    """Yield the models of a task, as a metafile describes them."""
    for name, entry in read_zoo().items():
        if entry.task == task and entry.config:
            yield {"Name": name, "Config": str(entry.config_path), "Weights": entry.addresses[0]}


def _with_ours(
    read_metafiles: Callable[[str], Iterator[dict[str, Any]]],
) -> Callable[[str], Iterator[dict[str, Any]]]:
    """Extend the function that lists the models in the folder of a library."""

    def models(dir: str) -> Iterator[dict[str, Any]]:
        yield from read_metafiles(dir)
        for library, task in TASKS.items():
            # A library that has not been imported is not the one in this folder.
            loaded = sys.modules.get(library) is not None
            if loaded and dir == BaseInferencer._get_repo_or_mim_dir(library):
                yield from _models(task)

    return models


MODULE2PACKAGE.setdefault(_PACKAGE, _PACKAGE)
BaseInferencer._get_models_from_metafile = staticmethod(  # type: ignore[method-assign]
    _with_ours(BaseInferencer._get_models_from_metafile)
)
