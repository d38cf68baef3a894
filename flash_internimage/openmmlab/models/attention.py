"""mmcv's multi-scale deformable attention, computed by the operators of ops_dcnv4."""

from contextlib import nullcontext
from typing import Any

import torch
from mmcv.ops import MultiScaleDeformableAttention
from mmengine.registry import MODELS
from mmengine.utils import deprecated_api_warning
from torch import Tensor, nn

from ops_dcnv4 import ms_deform_attn
from ops_dcnv4.modules import sampling_locations


@MODELS.register_module()
class FlashMultiScaleDeformableAttention(MultiScaleDeformableAttention):
    """Drop-in replacement for mmcv's MultiScaleDeformableAttention, based on ops_dcnv4.

    Parameters and results are those of mmcv, whose own operator supports only float32 and float16
    on GPUs and falls back to plain PyTorch otherwise. Sampling locations are never rounded to
    16 bits.

    mmdet's DETR layers instantiate mmcv's class directly, so it cannot be replaced by `type` in a
    config. Use :class:`~flash_internimage.openmmlab.FlashAttentionHook` instead.

    Args:
        args: Arguments of MultiScaleDeformableAttention.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        kwargs: Keyword arguments of MultiScaleDeformableAttention.
    """

    def __init__(
        self,
        *args: Any,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        with nullcontext() if device is None else torch.device(device):
            super().__init__(*args, **kwargs)
        self.to(dtype=dtype)

    def init_weights(self) -> None:
        """Initialize the parameters as mmcv does, keeping their dtype."""
        super().init_weights()
        bias = self.sampling_offsets.bias  # mmcv replaces it with a float32 tensor.
        bias.data = bias.data.to(self.sampling_offsets.weight.dtype)

    @deprecated_api_warning({"residual": "identity"}, cls_name="MultiScaleDeformableAttention")
    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        level_start_index: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Apply the attention and add `identity`.

        Args:
            query: (Lq, N, C), or (N, Lq, C) if `batch_first`. `value`, `identity` and `query_pos`
                have the same layout.
            key: Unused; mmcv's layers pass it.
            value: (S, N, C), the concatenated feature maps of all levels. Default: `query`.
            identity: Added to the result. Default: `query`, without `query_pos`.
            query_pos: Added to `query`.
            key_padding_mask: Boolean, (N, S); True for pixels whose values are treated as zero.
            reference_points: (N, Lq, L, 2) with (x, y) from 0 to 1, or (N, Lq, L, 4) with
                (x, y, w, h). N, Lq and L may be 1 and are broadcast.
            spatial_shapes: (L, 2), the height and width of each level.
            level_start_index: (L,), the index of the first pixel of each level. May be omitted.
            **kwargs: Unused; mmcv's layers pass them.

        Returns:
            A tensor of the shape of `query`.

        Raises:
            ValueError: If an argument is invalid. The message names it.
        """
        if reference_points is None:
            raise ValueError("reference_points must be a tensor, got None")
        if spatial_shapes is None:
            raise ValueError("spatial_shapes must be a tensor, got None")
        if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
            raise ValueError(
                f"key_padding_mask must be a tensor of torch.bool, got {key_padding_mask.dtype}"
            )
        value = query if value is None else value
        identity = query if identity is None else identity
        query = query if query_pos is None else query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)

        value = self.value_proj(value)
        if key_padding_mask is not None:
            value = value.masked_fill(key_padding_mask[..., None], 0)
        points = (self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(query).unflatten(-1, (*points, 2))
        logits = self.attention_weights(query).unflatten(-1, (self.num_heads, -1))
        locations = sampling_locations(offsets, reference_points, spatial_shapes)
        output = ms_deform_attn(
            value.unflatten(-1, (self.num_heads, -1)),
            spatial_shapes,
            level_start_index,
            locations,
            logits.softmax(-1, dtype=locations.dtype).unflatten(-1, points[1:]),
        )
        output = self.output_proj(output)
        if not self.batch_first:
            output = output.transpose(0, 1)
        return self.dropout(output) + identity


def use_flash_attention(model: nn.Module) -> int:
    """Switch every MultiScaleDeformableAttention in a model to the operators of ops_dcnv4.

    The modules are changed in place: parameters, hooks and an optimizer's references to them remain
    valid. Subclasses are left alone.

    Returns:
        The number of modules that were switched.
    """
    stock = [m for m in model.modules() if type(m) is MultiScaleDeformableAttention]
    for module in stock:
        module.__class__ = FlashMultiScaleDeformableAttention
    return len(stock)
