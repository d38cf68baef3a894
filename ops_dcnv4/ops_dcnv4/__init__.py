"""DCNv4 and multi-scale deformable attention for PyTorch, on CPUs, GPUs and any other device."""

from . import decompositions, flops
from .attention import flash_deform_attn, ms_deform_attn
from .backends import choose_backend, explain_backend, is_compiled, library_path, use_backend
from .modules import DCNv3, DCNv4, DCNv4Conv2d, FlashDeformAttn
from .ops import dcnv3, dcnv4
from .window import output_size

__version__ = "0.1.0"

__all__ = [
    "DCNv3",
    "DCNv4",
    "DCNv4Conv2d",
    "FlashDeformAttn",
    "choose_backend",
    "dcnv3",
    "dcnv4",
    "decompositions",
    "explain_backend",
    "flash_deform_attn",
    "flops",
    "is_compiled",
    "library_path",
    "ms_deform_attn",
    "output_size",
    "use_backend",
]
