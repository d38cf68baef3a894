"""The backbones FlashInternImage and InternImage."""

from .base import Backbone
from .flash_internimage import FlashInternImage
from .intern_image import InternImage

__all__ = ["Backbone", "FlashInternImage", "InternImage"]
