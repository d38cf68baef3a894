"""What OpenMMLab's projects need of this package, registered with the engine's root registries.

custom_imports = dict(imports=['flash_internimage.openmmlab'])
"""

from .attention import (
    FlashAttentionHook,
    FlashMultiScaleDeformableAttention,
    use_flash_attention,
)
from .backbone import FlashInternImageBackbone
from .neck import LayerNormFPN

__all__ = [
    "FlashAttentionHook",
    "FlashInternImageBackbone",
    "FlashMultiScaleDeformableAttention",
    "LayerNormFPN",
    "use_flash_attention",
]
