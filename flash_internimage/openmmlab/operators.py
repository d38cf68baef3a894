"""Provide mmcv's operators where :mod:`flash_internimage_startup` did not run, as on PYTHONPATH.

See :mod:`flash_internimage.mmcv_ops`.
"""

import importlib.util
import sys
import warnings

import flash_internimage_startup

if importlib.util.find_spec("mmcv._ext") is None:
    _early = [name for name in sys.modules if name.startswith(("mmcv.cnn.", "mmdet.", "mmseg."))]
    if _early:
        warnings.warn(
            f"{_early[0]} was imported before flash_internimage.openmmlab and has none of mmcv's "
            "operators, because mmcv was installed without them: import "
            "flash_internimage.openmmlab first",
            stacklevel=1,
        )
    flash_internimage_startup.install()
