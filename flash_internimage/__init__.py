"""FlashInternImage backbone and the code that all tasks share.

Importing this package registers the models with timm.
"""

import sys

from . import checkpoints, dropin
from .backbones import FlashInternImage, InternImage

__version__ = "0.1.0"

__all__ = ["FlashInternImage", "InternImage", "dropin"]

# Former names of these modules, kept for one release.
sys.modules[f"{__name__}.checkpoint"] = checkpoints
sys.modules[f"{__name__}.conversion"] = checkpoints.conversion
