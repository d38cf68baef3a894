"""Replace layers of other models by DCNv4."""

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import timm
from timm.layers import Attention
from timm.models import register_model
from timm.models.convnext import ConvNeXtBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ops_dcnv4 import DCNv4, DCNv4Conv2d

_logger = logging.getLogger(__name__)

# Names of layers, or a function of a layer's name and module that returns whether to replace it.
Which = str | Iterable[str] | Callable[[str, nn.Module], bool]


class DepthwiseDCNv4(nn.Module):
    """DCNv4 in place of a depth-wise convolution, (N, C, H, W) -> (N, C, H_out, W_out).

    Like the convolution, it has no projections. A fresh layer averages over its window.

    Args:
        channels: Number of channels C.
        **dcn: Arguments of :class:`~ops_dcnv4.DCNv4`.
    """

    def __init__(self, channels: int, **dcn: Any) -> None:
        super().__init__()
        self.dcn = DCNv4(channels, **{"without_pointwise": True, **dcn})

    def forward(self, x: Tensor) -> Tensor:
        """Apply DCNv4 to x (N, C, H, W)."""
        return self.dcn(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TokenDCNv4(nn.Module):
    """DCNv4 in place of the attention of a vision transformer, (N, H * W, C) -> (N, H * W, C).

    Args:
        channels: Number of channels C.
        grid_size: (H, W) of the tokens; images with another number of tokens must be square.
        **dcn: Arguments of :class:`~ops_dcnv4.DCNv4`.
    """

    def __init__(self, channels: int, grid_size: tuple[int, int], **dcn: Any) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.dcn = DCNv4(channels, **dcn)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Apply DCNv4 to tokens (N, H * W, C), row by row of the image.

        Raises:
            ValueError: If `attn_mask` or `is_causal` is given, or the tokens are no image.
        """
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask must be None and is_causal False: DCNv4 has no attention")
        is_grid = x.shape[1] == math.prod(self.grid_size)
        return self.dcn(x, self.grid_size if is_grid else None)


def replace(
    model: nn.Module, which: Which | None = None, *, group_channels: int = 16, **dcn: Any
) -> nn.Module:
    """Replace layers of a model by DCNv4, in place.

    By default, the depth-wise convolutions of a timm ConvNeXt and the attention of a timm vision
    transformer are replaced, as in the paper (arXiv:2401.06197, section 4.4). A vision transformer
    loses its class token and averages over the other tokens instead. The new layers are randomly
    initialized and average over their windows at first. The log lists the replaced layers.

    Args:
        model: Model to change.
        which: Layers to replace: names of modules, a single name, or a function of a layer's name
            and module. Depth-wise and ungrouped `nn.Conv2d` and timm's `Attention` are supported.
            None selects those of the paper.
        group_channels: Channels per group of DCNv4. Layers whose channels it does not divide use
            the greatest common divisor.
        **dcn: Arguments of :class:`~ops_dcnv4.DCNv4` for depth-wise convolutions and attention,
            such as `kernel_size` (default: 3, or that of a convolution that crops the image).
            Ungrouped convolutions keep their window.

    Returns:
        The model.

    Raises:
        TypeError: If an argument of DCNv4 has the wrong type.
        ValueError: If there is no layer to replace, a layer is not supported, or an argument is out
            of range.

    Example:
        >>> model = replace(timm.create_model("convnext_atto", num_classes=10))
        >>> type(model.stages[0].blocks[0].conv_dw).__name__
        'DepthwiseDCNv4'
    """
    names = _find(model, which)
    # Nothing is changed if one of the layers is not supported.
    put_layers(model, {name: _replacement(model, name, group_channels, dcn) for name in names})
    return model


def put_layers(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Put layers in place of those with the same names, and log their names."""
    before = _count(model)
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    for transformer in model.modules():
        if isinstance(transformer, VisionTransformer) and _has_tokens(transformer):
            _drop_prefix_tokens(transformer)
    _logger.info(
        "replaced %d layers by DCNv4, %.1f M parameters before and %.1f M after: %s",
        len(layers), before / 1e6, _count(model) / 1e6, ", ".join(layers),
    )  # fmt: skip


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _find(model: nn.Module, which: Which | None) -> list[str]:
    """Return the names of the layers to replace."""
    modules = dict(model.named_modules())
    if which is None:
        names = [f"{n}.conv_dw" for n, m in modules.items() if isinstance(m, ConvNeXtBlock)]
        for name, module in modules.items():
            if isinstance(module, VisionTransformer):
                prefix = f"{name}." if name else ""
                names += [f"{prefix}blocks.{i}.attn" for i in range(len(module.blocks))]
        if not names:
            raise ValueError(
                "which must be given for a model without a ConvNeXt or vision transformer of timm, "
                f"got {type(model).__name__}"
            )
        return names
    if callable(which):
        names = [name for name, module in modules.items() if name and which(name, module)]
        if not names:
            raise ValueError(f"which must select layers of {type(model).__name__}, got none")
        return names
    names = [which] if isinstance(which, str) else list(which)
    unknown = [name for name in names if not name or name not in modules]
    if unknown or not names:
        raise ValueError(
            f"which must be names of layers of {type(model).__name__}, got "
            f"{', '.join(map(repr, unknown)) or 'none'}"
        )
    return list(dict.fromkeys(names))


def _replacement(
    model: nn.Module, name: str, group_channels: int, dcn: dict[str, Any]
) -> nn.Module:
    """Return the layer to put in place of another."""
    layer = model.get_submodule(name)
    if isinstance(layer, Attention):
        options = options_of(layer.qkv.in_features, group_channels, {"kernel_size": 3, **dcn})
        grid_size = _transformer_of(model, name).patch_embed.grid_size
        return TokenDCNv4(layer.qkv.in_features, grid_size, **options, **factory_of(layer))
    # Subclasses may compute something else.
    if type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
        if layer.groups == 1:
            return _convolution(name, layer, group_channels, dcn)
        if layer.groups == layer.in_channels == layer.out_channels:
            options = {**_window(layer), **dcn}
            options = options_of(layer.in_channels, group_channels, options)
            return DepthwiseDCNv4(layer.in_channels, **options, **factory_of(layer))
    raise ValueError(
        "which must select timm's Attention, or depth-wise or ungrouped nn.Conv2d padded with "
        f"zeros, got {name}: {layer}"
    )


def _convolution(
    name: str, layer: nn.Conv2d, group_channels: int, dcn: dict[str, Any]
) -> DCNv4Conv2d:
    if dcn:
        raise ValueError(
            f"{next(iter(dcn))} must not be given with ungrouped convolutions, whose window is "
            f"kept, got {name}"
        )
    return DCNv4Conv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,  # type: ignore[arg-type]
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        layer.dilation,  # type: ignore[arg-type]
        bias=layer.bias is not None,
        offset_groups=_groups(layer.in_channels, group_channels),
        **factory_of(layer),
    )


def factory_of(layer: nn.Module) -> dict[str, Any]:
    """Return the device and dtype of a layer's parameters."""
    parameter = next(layer.parameters())
    return {"device": parameter.device, "dtype": parameter.dtype}


def _window(layer: nn.Conv2d) -> dict[str, Any]:
    """Return a 3 x 3 window if the layer keeps the size up to its stride, else its own window."""
    extents = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    if layer.padding == "same" or [2 * p for p in _padding(layer)] == extents:
        return {"kernel_size": 3, "stride": layer.stride}
    return {
        "kernel_size": layer.kernel_size,
        "stride": layer.stride,
        "pad": _padding(layer),
        "dilation": layer.dilation,
    }


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    return (0, 0) if isinstance(layer.padding, str) else layer.padding


def _groups(channels: int, group_channels: int) -> int:
    if (
        isinstance(group_channels, bool)
        or not isinstance(group_channels, int)
        or group_channels < 1
    ):
        raise ValueError(f"group_channels must be a positive integer, got {group_channels!r}")
    return channels // math.gcd(channels, group_channels)


def options_of(channels: int, group_channels: int, dcn: dict[str, Any]) -> dict[str, Any]:
    """Add the number of groups, the padding that keeps the size, and an average at first."""
    size = dcn["kernel_size"]
    height, width = size if isinstance(size, tuple) else (size, size)
    taps = height * width - bool(dcn.get("remove_center"))
    return {
        "group": _groups(channels, group_channels),
        "pad": (height // 2, width // 2),
        "initial_modulation": 1 / max(taps, 1),
        **dcn,
    }


def _transformer_of(model: nn.Module, name: str) -> VisionTransformer:
    while name:
        name = name.rpartition(".")[0]
        parent = model.get_submodule(name)
        if isinstance(parent, VisionTransformer):
            return parent
    raise ValueError("which must select attention in a VisionTransformer of timm, got another one")


def _has_tokens(transformer: VisionTransformer) -> bool:
    replaced = any(isinstance(module, TokenDCNv4) for module in transformer.modules())
    return replaced and bool(transformer.num_prefix_tokens)


def _drop_prefix_tokens(transformer: VisionTransformer) -> None:
    """Remove class and register tokens, and average over the tokens of the image instead."""
    if transformer.pos_embed is not None and not transformer.no_embed_class:
        kept = transformer.pos_embed.detach()[:, transformer.num_prefix_tokens :]
        transformer.pos_embed = nn.Parameter(kept.clone())
    transformer.cls_token = transformer.reg_token = None
    transformer.has_class_token = False
    transformer.num_prefix_tokens = transformer.num_reg_tokens = 0
    if transformer.global_pool == "token":
        transformer.global_pool = "avg"


def _create(name: str, original: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    if pretrained:
        raise ValueError(f"pretrained must be False: {name} has no released weights")
    return replace(timm.create_model(original, **kwargs))


@register_model
def convnext_base_dcnv4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create ConvNeXt-B with DCNv4 in place of its depth-wise convolutions."""
    return _create("convnext_base_dcnv4", "convnext_base", pretrained, kwargs)


@register_model
def vit_base_dcnv4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create ViT-B/16 with DCNv4 in place of its attention."""
    return _create("vit_base_dcnv4", "vit_base_patch16_224", pretrained, kwargs)
