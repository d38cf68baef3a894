"""Backbone, layers, hooks and runner for OpenMMLab, registered in mmengine's root registries.

Importing this package, `flash_internimage.openmmlab.detection` or
`flash_internimage.openmmlab.segmentation` registers new names and changes nothing else: types, the
prefix `flash_internimage::` of configs, and models of the zoo for OpenMMLab's inferencers. There is
one exception: if mmcv was installed without compiled operators, torchvision's take their place, see
:mod:`~flash_internimage.mmcv_ops`. To read files safely in scripts without
:class:`SafeRunner`, see :func:`enable_safe_loading`.

Example::

    custom_imports = dict(imports=['flash_internimage.openmmlab'])
"""

from . import operators  # noqa: F401, I001  before anything imports mmcv.ops
from . import model_index  # noqa: F401
from .datasets.transforms import LoadReadableImage
from .engine.hooks.checkpoint import AtomicCheckpointHook
from .engine.hooks.curves import CurvesHook
from .engine.hooks.early_stopping import ResumableEarlyStoppingHook
from .engine.hooks.finite import CheckFiniteHook
from .engine.hooks.model import CompileBackboneHook, FlashAttentionHook, Float32OutputsHook
from .engine.optimizers.bfloat16 import BFloat16OptimWrapper
from .engine.optimizers.layer_decay import InternImageLayerDecayOptimizerConstructor
from .engine.runner.runner import SafeRunner
from .engine.vis_backends import RunTensorboardVisBackend, RunTrackerVisBackend
from .models.attention import FlashMultiScaleDeformableAttention, use_flash_attention
from .models.backbone import FlashInternImageBackbone, InternImageBackbone
from .models.convolution import FlashDCNv4
from .models.neck import LayerNormFPN
from .safe_loading import enable_safe_loading

__all__ = [
    "AtomicCheckpointHook",
    "BFloat16OptimWrapper",
    "CheckFiniteHook",
    "CompileBackboneHook",
    "CurvesHook",
    "FlashAttentionHook",
    "FlashDCNv4",
    "FlashInternImageBackbone",
    "FlashMultiScaleDeformableAttention",
    "Float32OutputsHook",
    "InternImageBackbone",
    "InternImageLayerDecayOptimizerConstructor",
    "LayerNormFPN",
    "LoadReadableImage",
    "ResumableEarlyStoppingHook",
    "RunTensorboardVisBackend",
    "RunTrackerVisBackend",
    "SafeRunner",
    "enable_safe_loading",
    "use_flash_attention",
]
