"""DCNv4 deformable convolution for PyTorch: fast where there is a kernel, right on every device."""

from .modules import DCNv4, DCNv4Conv2d
from .ops import dcnv4, is_compiled, output_size

__all__ = ["DCNv4", "DCNv4Conv2d", "dcnv4", "is_compiled", "output_size"]
