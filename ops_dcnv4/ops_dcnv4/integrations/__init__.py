"""The operators in models of other libraries: transformers, mmcv and torchvision.

:func:`patch` replaces the attention and the deformable convolutions of a model in place. None of
these libraries is imported here.
"""

from .deform_conv import deform_conv2d
from .patching import Report, patch, unpatch

__all__ = ["Report", "deform_conv2d", "patch", "unpatch"]
