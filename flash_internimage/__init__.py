"""FlashInternImage backbone and the code that all tasks share.

Importing this package registers the models with timm.
"""

from .backbone import FlashInternImage

__version__ = "0.1.0"

__all__ = ["FlashInternImage"]
