"""Attention pooling before the classifier of InternImage-H and -G."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import layer_norm


class CrossAttention(nn.Module):
    """Multi-head attention of queries to keys and values, (N, L, C) -> (N, L, C_out).

    Args:
        channels: Number of input channels C.
        heads: Number of heads; must divide C.
        out_channels: Number of output channels C_out.
        **factory: `device` and `dtype` of the parameters.
    """

    def __init__(self, channels: int, heads: int, out_channels: int, **factory: Any) -> None:
        super().__init__()
        self.heads = heads
        for name in ("q", "k", "v"):
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(channels, **factory)))
        for name in ("q", "k", "v"):
            self.add_module(name, nn.Linear(channels, channels, bias=False, **factory))
        self.proj = nn.Linear(channels, out_channels, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the biases; the linear layers initialize themselves."""
        for name in ("q", "k", "v"):
            nn.init.zeros_(self.get_parameter(f"{name}_bias"))

    def _heads(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.get_parameter(f"{name}.weight"), self.get_parameter(f"{name}_bias")
        return F.linear(x, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend from queries (N, L, C) to keys and values (N, S, C)."""
        q, k, v = self._heads("q", query), self._heads("k", key), self._heads("v", value)
        output = F.scaled_dot_product_attention(q, k, v)
        return self.proj(output.transpose(1, 2).flatten(2))


class AttentionPooling(nn.Module):
    """Pool features by attention from their mean, (N, C, H, W) -> (N, C_out).

    Args:
        channels: Number of input channels C.
        heads: Number of heads; must divide C.
        out_channels: Number of output channels C_out.
        **factory: `device` and `dtype` of the parameters.
    """

    def __init__(self, channels: int, heads: int, out_channels: int, **factory: Any) -> None:
        super().__init__()
        self.norm1_q = nn.Sequential(layer_norm(channels, **factory))
        self.norm1_k = nn.Sequential(layer_norm(channels, **factory))
        self.norm1_v = nn.Sequential(layer_norm(channels, **factory))
        self.cross_dcn = CrossAttention(channels, heads, out_channels, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """Pool features (N, C, H, W)."""
        tokens = x.flatten(2).transpose(1, 2)
        query = self.norm1_q(tokens.mean(1, keepdim=True))
        return self.cross_dcn(query, self.norm1_k(tokens), self.norm1_v(tokens)).squeeze(1)
