"""FlashInternImage: the backbone and what every task shares around it.

Importing this package registers the models with timm.
"""

from .backbone import FlashInternImage

__all__ = ["FlashInternImage"]
