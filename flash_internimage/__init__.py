"""FlashInternImage backbone and the code that all tasks share.

Importing this package registers the models with timm.
"""

from .backbone import FlashInternImage

__all__ = ["FlashInternImage"]
