"""mmcv's multi-scale deformable attention on the operators of ops_dcnv4."""

from contextlib import nullcontext
from typing import Any

import torch
from mmcv.ops import MultiScaleDeformableAttention
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner
from mmengine.utils import deprecated_api_warning
from torch import Tensor, nn

from ops_dcnv4 import ms_deform_attn
from ops_dcnv4.modules import sampling_locations


@MODELS.register_module()
class FlashMultiScaleDeformableAttention(MultiScaleDeformableAttention):
    """mmcv's MultiScaleDeformableAttention on the operators of ops_dcnv4.

    Arguments other than `device` and `dtype`, parameters and results are mmcv's. Its own operator
    runs on GPUs in float32 and float16 only, and leaves the CPU and bfloat16 to plain PyTorch.
    Sampling locations are never rounded to 16 bits. mmdet's DETR layers name mmcv's class in their
    code, so no `type` in a config can replace it: :class:`FlashAttentionHook` does.
    """

    def __init__(
        self,
        *args: Any,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ):
        with nullcontext() if device is None else torch.device(device):
            super().__init__(*args, **kwargs)
        self.to(dtype=dtype)

    def init_weights(self) -> None:
        """Initialise the parameters as mmcv does, in the dtype that they have."""
        super().init_weights()
        bias = self.sampling_offsets.bias  # of float32 now
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
        **kwargs,
    ) -> Tensor:
        """
        Args:
            query: (Lq, N, C), or (N, Lq, C) if batch_first; all others but the reference points and
                the mask alike.
            key: not used, nor are further keyword arguments; mmcv's layers pass them.
            value: (S, N, C), the feature maps of all levels one behind the other; default `query`.
            identity: added to the result; default `query`.
            query_pos: added to `query`.
            key_padding_mask: (N, S), True for pixels that count as zero.
            reference_points: (N, Lq, L, 2), (x, y) from 0 to 1, or (N, Lq, L, 4), (x, y, w, h); N,
                Lq and L may be 1, for all images, queries or levels.
            spatial_shapes: (L, 2), (H, W) of each level.
            level_start_index: (L,), the first pixel of each level; may be left out.

        Returns:
            A tensor like `query`.

        Raises:
            ValueError: an argument does not fit; the message names it.
        """
        for name, argument in (
            ("reference_points", reference_points),
            ("spatial_shapes", spatial_shapes),
        ):
            if argument is None:
                raise ValueError(f"{name} must be a tensor, got None")
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
            locations,
            logits.softmax(-1, dtype=locations.dtype).unflatten(-1, points[1:]),
            level_start_index,
        )
        output = self.output_proj(output)
        if not self.batch_first:
            output = output.transpose(0, 1)
        return self.dropout(output) + identity


def use_flash_attention(model: nn.Module) -> int:
    """Makes every MultiScaleDeformableAttention in a model compute with ops_dcnv4's operators.

    Parameters, hooks and the optimizer's references to them stay as they are.

    Returns:
        How many there were.
    """
    stock = [m for m in model.modules() if type(m) is MultiScaleDeformableAttention]
    for module in stock:
        module.__class__ = FlashMultiScaleDeformableAttention
    return len(stock)


@HOOKS.register_module()
class FlashAttentionHook(Hook):
    """Switches a runner's model to :class:`FlashMultiScaleDeformableAttention`, by one line:

    custom_hooks = [dict(type='FlashAttentionHook')]
    """

    def before_run(self, runner: Runner) -> None:
        count = use_flash_attention(runner.model)
        log = runner.logger.info if count else runner.logger.warning
        log(f"{count} layers of MultiScaleDeformableAttention now compute with ops_dcnv4")
