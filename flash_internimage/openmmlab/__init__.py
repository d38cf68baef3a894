"""What OpenMMLab's projects need of this package, registered with the engine's root registries.

custom_imports = dict(imports=['flash_internimage.openmmlab'])
"""

from .attention import (
    FlashAttentionHook,
    FlashMultiScaleDeformableAttention,
    use_flash_attention,
)
from .backbone import FlashInternImageBackbone
from .curves import CurvesHook
from .files import LoadReadableImage
from .layer_decay import LayerDecayOptimWrapperConstructor
from .neck import LayerNormFPN
from .runtime import (
    AtomicCheckpointHook,
    BFloat16OptimWrapper,
    CompileBackboneHook,
    FlashRunner,
    Float32OutputsHook,
)

__all__ = [
    "AtomicCheckpointHook",
    "BFloat16OptimWrapper",
    "CompileBackboneHook",
    "CurvesHook",
    "FlashAttentionHook",
    "FlashInternImageBackbone",
    "FlashMultiScaleDeformableAttention",
    "FlashRunner",
    "Float32OutputsHook",
    "LayerDecayOptimWrapperConstructor",
    "LayerNormFPN",
    "LoadReadableImage",
    "use_flash_attention",
]
