"""Multi-scale deformable attention by Triton kernels, for Hugging Face's kernel hub."""

from . import layers
from .operators import ms_deform_attn

__all__ = ["layers", "ms_deform_attn"]
