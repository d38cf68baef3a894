"""DCNv3, DCNv4 and deformable attention layers, and a drop-in replacement for nn.Conv2d."""

from .conv2d import DCNv4Conv2d
from .dcnv3 import DCNv3
from .dcnv4 import DCNv4
from .flash_deform_attn import FlashDeformAttn, sampling_locations

__all__ = ["DCNv3", "DCNv4", "DCNv4Conv2d", "FlashDeformAttn", "sampling_locations"]
