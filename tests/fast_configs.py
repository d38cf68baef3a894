"""Save most of the time that mmengine needs for a config; imported for its effect.

mmengine formats the config of each run seven times, and reads all metafiles of MMDetection for each
path that begins with `mmdet::`.
"""

import functools
from importlib import import_module
from importlib.util import find_spec

if find_spec("mmengine"):
    utils = import_module("mmengine.config.utils")
    utils.load = functools.cache(utils.load)
    import_module("yapf.yapflib.yapf_api").FormatCode = lambda text, **_: (text, True)
