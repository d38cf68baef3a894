"""Building blocks of FlashInternImage and InternImage, from small to large.

Features are channels-last, (N, H, W, C).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from timm.layers import DropPath, Mlp
from timm.models._manipulate import checkpoint
from torch import Tensor, nn
from torchvision.ops import Permute


def to_channels_first() -> Permute:
    """Return a layer that permutes (N, H, W, C) to (N, C, H, W)."""
    return Permute([0, 3, 1, 2])


def to_channels_last() -> Permute:
    """Return a layer that permutes (N, C, H, W) to (N, H, W, C)."""
    return Permute([0, 2, 3, 1])


def layer_norm(channels: int, **factory: Any) -> nn.LayerNorm:
    """Return a layer norm over the last dimension with `eps=1e-6`."""
    return nn.LayerNorm(channels, eps=1e-6, **factory)


class Stem(nn.Module):
    """Stem of two strided convolutions, (N, C_in, H, W) -> (N, H/4, W/4, C).

    Args:
        in_chans: Number of input channels C_in.
        channels: Number of output channels C.
        **factory: `device` and `dtype` of the parameters.
    """

    def __init__(self, in_chans: int, channels: int, **factory: Any) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(in_chans, half, kernel_size=3, stride=2, padding=1, **factory)
        self.norm1 = nn.Sequential(
            to_channels_last(), layer_norm(half, **factory), to_channels_first()
        )
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(half, channels, kernel_size=3, stride=2, padding=1, **factory)
        self.norm2 = nn.Sequential(to_channels_last(), layer_norm(channels, **factory))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C_in, H, W) to features (N, H/4, W/4, C)."""
        return self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))


class Downsample(nn.Module):
    """Strided convolution and norm between two stages, (N, H, W, C) -> (N, H/2, W/2, 2*C).

    Args:
        channels: Number of input channels C.
        **factory: `device` and `dtype` of the parameters.
    """

    def __init__(self, channels: int, **factory: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            channels, 2 * channels, kernel_size=3, stride=2, padding=1, bias=False, **factory
        )
        self.norm = nn.Sequential(to_channels_last(), layer_norm(2 * channels, **factory))

    def forward(self, x: Tensor) -> Tensor:
        """Map features (N, H, W, C) to (N, H/2, W/2, 2*C)."""
        return self.norm(self.conv(x.permute(0, 3, 1, 2)))


class Block(nn.Module):
    """Residual block of a deformable convolution and an MLP on features (N, H, W, C).

    Args:
        channels: Number of input and output channels C.
        dcn: Deformable convolution, (N, H, W, C) -> (N, H, W, C).
        mlp_ratio: Ratio of hidden to input channels in the MLP.
        drop_path: Stochastic depth rate of both branches.
        layer_scale: Initial value of the layer scale; None disables it.
        post_norm: Normalize the output of each residual branch instead of its input.
        res_post_norm: Normalize the output of each residual branch as well as its input.
        mlp_fc2_bias: Add a bias to the second linear layer of the MLP.
        **factory: `device` and `dtype` of the parameters.
    """

    def __init__(
        self,
        channels: int,
        dcn: nn.Module,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        post_norm: bool = False,
        res_post_norm: bool = False,
        mlp_fc2_bias: bool = False,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.layer_scale = layer_scale
        self.gamma1: nn.Parameter | None = None
        self.gamma2: nn.Parameter | None = None
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.empty(channels, **factory))
            self.gamma2 = nn.Parameter(torch.empty(channels, **factory))
        self.norm1 = nn.Sequential(layer_norm(channels, **factory))
        self.dcn = dcn
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.Sequential(layer_norm(channels, **factory))
        self.mlp = Mlp(channels, int(channels * mlp_ratio), bias=(True, mlp_fc2_bias), **factory)
        self.res_post_norm1: nn.Module | None = None
        self.res_post_norm2: nn.Module | None = None
        if res_post_norm:
            self.res_post_norm1 = nn.Sequential(layer_norm(channels, **factory))
            self.res_post_norm2 = nn.Sequential(layer_norm(channels, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the layer scale; the layers initialize themselves."""
        for gamma in (self.gamma1, self.gamma2):
            if gamma is not None and self.layer_scale is not None:
                nn.init.constant_(gamma, self.layer_scale)

    def _deform(self, x: Tensor) -> Tensor:
        if isinstance(x, torch.fx.Proxy):  # torch.fx cannot trace the argument checks.
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self.dcn), (x,), {})
        return self.dcn(x)

    def _branch(
        self,
        x: Tensor,
        layer: Callable[[Tensor], Tensor],
        norm: nn.Module,
        res_post_norm: nn.Module | None,
        gamma: Tensor | None,
    ) -> Tensor:
        out = norm(layer(x)) if self.post_norm else layer(norm(x))
        if res_post_norm is not None:
            out = res_post_norm(out)
        return self.drop_path(out if gamma is None else gamma * out)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both residual branches to features (N, H, W, C)."""
        x = x + self._branch(x, self._deform, self.norm1, self.res_post_norm1, self.gamma1)
        return x + self._branch(x, self.mlp, self.norm2, self.res_post_norm2, self.gamma2)


class Stage(nn.Module):
    """Sequence of blocks, optionally followed by a norm.

    The forward pass does not include `downsample`, which leads to the next stage.

    Args:
        channels: Number of input and output channels C.
        blocks: The blocks.
        norm: Normalize the output of the last block.
        norms_after: Indices of further blocks whose outputs are normalized.
        downsample: Whether another stage follows.
        **factory: `device` and `dtype` of the parameters.
    """

    def __init__(
        self,
        channels: int,
        blocks: Iterable[Block],
        norm: bool,
        downsample: bool,
        norms_after: Sequence[int] = (),
        **factory: Any,
    ) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.Sequential(layer_norm(channels, **factory)) if norm else nn.Identity()
        self.norms_after = tuple(norms_after)
        self.post_norms = nn.ModuleList(
            nn.Sequential(layer_norm(channels, **factory)) for _ in norms_after
        )
        self.downsample = Downsample(channels, **factory) if downsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the blocks and the norms to features (N, H, W, C)."""
        for i, block in enumerate(self.blocks):
            recompute = self.grad_checkpointing and x.requires_grad
            x = checkpoint(block, x) if recompute else block(x)
            if i in self.norms_after:
                x = self.post_norms[self.norms_after.index(i)](x)
        return self.norm(x)
