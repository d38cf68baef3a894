"""The feature pyramid of the published Mask R-CNN and Cascade Mask R-CNN."""

from collections.abc import Sequence

import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn


class _ConvNorm(nn.Module):
    """Convolution without bias, followed by LayerNorm over the channels of each pixel."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, bias=False)
        self.ln = nn.LayerNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.ln(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@MODELS.register_module()
class LayerNormFPN(BaseModule):
    """Feature Pyramid Network (arXiv:1612.03144) with LayerNorm after every convolution.

    Args:
        in_channels: Number of channels of each input.
        out_channels: Number of channels of every output.
        num_outs: Number of outputs. Each one beyond the number of inputs is its predecessor
            subsampled with stride 2.

    Raises:
        ValueError: If there are fewer outputs than inputs.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, num_outs: int) -> None:
        super().__init__(init_cfg={"type": "Xavier", "layer": "Conv2d", "distribution": "uniform"})
        if num_outs < len(in_channels):
            raise ValueError(
                f"num_outs must be at least the number of in_channels ({len(in_channels)}), "
                f"got {num_outs}"
            )
        self.num_extra = num_outs - len(in_channels)
        self.lateral_convs = nn.ModuleList(
            _ConvNorm(channels, out_channels, kernel_size=1) for channels in in_channels
        )
        self.fpn_convs = nn.ModuleList(
            _ConvNorm(out_channels, out_channels, kernel_size=3) for _ in in_channels
        )

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Compute the pyramid.

        Args:
            inputs: Feature maps (N, C_i, H_i, W_i), finest first.

        Returns:
            `num_outs` feature maps of `out_channels` channels, finest first.
        """
        if len(inputs) != len(self.lateral_convs):
            raise ValueError(
                f"inputs must hold {len(self.lateral_convs)} feature maps, got {len(inputs)}"
            )
        maps = [conv(x) for conv, x in zip(self.lateral_convs, inputs, strict=True)]
        for i in reversed(range(len(maps) - 1)):
            maps[i] = maps[i] + F.interpolate(maps[i + 1], size=maps[i].shape[-2:])
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, maps, strict=True)]
        for _ in range(self.num_extra):
            outputs.append(outputs[-1][..., ::2, ::2])
        # mmcv's RoIAlign assumes that memory is laid out as (N, C, H, W).
        return tuple(x.contiguous() for x in outputs)
