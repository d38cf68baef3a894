"""Backbone, layers, hooks and runner for OpenMMLab, registered in mmengine's root registries.

Importing this module registers names and changes nothing else. For checkpoints that mmengine
reads on its own, see :func:`use_safe_checkpoint_reader`.

Example::

    custom_imports = dict(imports=['flash_internimage.openmmlab'])
"""

from .attention import (
    FlashAttentionHook,
    FlashMultiScaleDeformableAttention,
    use_flash_attention,
)
from .backbone import FlashInternImageBackbone
from .convolution import FlashDCNv4
from .curves import CurvesHook
from .files import LoadReadableImage
from .hooks import (
    AtomicCheckpointHook,
    BFloat16OptimWrapper,
    CompileBackboneHook,
    Float32OutputsHook,
)
from .layer_decay import LayerDecayOptimWrapperConstructor
from .neck import LayerNormFPN
from .runtime import FlashRunner, use_safe_checkpoint_reader

__all__ = [
    "AtomicCheckpointHook",
    "BFloat16OptimWrapper",
    "CompileBackboneHook",
    "CurvesHook",
    "FlashAttentionHook",
    "FlashDCNv4",
    "FlashInternImageBackbone",
    "FlashMultiScaleDeformableAttention",
    "FlashRunner",
    "Float32OutputsHook",
    "LayerDecayOptimWrapperConstructor",
    "LayerNormFPN",
    "LoadReadableImage",
    "use_flash_attention",
    "use_safe_checkpoint_reader",
]
