"""Programs that train and evaluate classifiers.

The modules that they use are in :mod:`flash_internimage.classification`. Their former names, such
as `classification.config`, remain importable for one release.
"""

import importlib
import sys

_UNCHANGED = ("config", "data", "interruption", "model", "optim", "output", "processes", "report")
_FORMER_NAMES = {name: name for name in (*_UNCHANGED, "state", "strict_yaml")}
_FORMER_NAMES |= {name: f"data.{name}" for name in ("classes", "datasets", "folders")}

for _name, _current in _FORMER_NAMES.items():
    _module = importlib.import_module(f"flash_internimage.classification.{_current}")
    sys.modules[f"{__name__}.{_name}"] = globals()[_name] = _module
