"""Scripts that train and evaluate classifiers.

The modules that they use are in :mod:`flash_internimage.classification`.
"""

import importlib
import sys

for _name in ("config", "data", "report"):  # former names, kept for one release
    _module = importlib.import_module(f"flash_internimage.classification.{_name}")
    sys.modules[f"{__name__}.{_name}"] = globals()[_name] = _module
