"""FlashInternImage (DCNv4, arXiv:2401.06197), registered with timm.

Parameter names and shapes match the released checkpoints.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model

from ops_dcnv4 import DCNv4

from .base import Backbone, create, make_cfg, released_cfgs


class FlashInternImage(Backbone):
    """FlashInternImage backbone and classifier with feature maps at strides 4 to 32.

    Args:
        in_chans: Number of input channels.
        num_classes: Number of classes; 0 omits the classifier.
        global_pool: Pooling before the classifier: 'avg', 'max', 'avgmax', 'catavgmax', or '' for
            none.
        channels: Number of channels in the first stage, doubled in each following stage.
        depths: Number of blocks per stage.
        groups: Number of DCNv4 groups per stage.
        mlp_ratio: Ratio of hidden to input channels in the MLPs.
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; the rates increase linearly from 0.
        layer_scale: Initial value of the layer scale; None disables it.
        offset_scale: Factor on the offsets that DCNv4 predicts.
        post_norm: Normalize the output of each residual branch instead of its input.
        dw_kernel_size: Kernel size of the depth-wise convolution in DCNv4; None omits it.
        dcn_output_bias: Add a bias to the output projection of DCNv4.
        mlp_fc2_bias: Add a bias to the second linear layer of the MLPs.
        cls_scale: Ratio of channels in the final 1x1 convolution to those of the last stage.
        output_stride: Stride of the last stage; only 32 is supported.
        device: Device of the parameters. After 'meta', call `to_empty` and :meth:`init_weights`.
        dtype: Floating-point dtype of the parameters.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        channels: int = 64,
        depths: Sequence[int] = (4, 4, 18, 4),
        groups: Sequence[int] = (4, 8, 16, 32),
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale: float | None = None,
        offset_scale: float = 1.0,
        post_norm: bool = False,
        dw_kernel_size: int | None = None,
        dcn_output_bias: bool = False,
        mlp_fc2_bias: bool = False,
        cls_scale: float = 1.5,
        output_stride: int = 32,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            in_chans,
            channels,
            depths,
            groups,
            make_dcn=lambda channels, groups: DCNv4(
                channels,
                group=groups,
                offset_scale=offset_scale,
                dw_kernel_size=dw_kernel_size,
                output_bias=dcn_output_bias,
                **factory,
            ),
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path_rate,
            stage_norm=not post_norm,
            output_stride=output_stride,
            layer_scale=layer_scale,
            post_norm=post_norm,
            mlp_fc2_bias=mlp_fc2_bias,
            **factory,
        )
        self._add_conv_head(num_classes, global_pool, drop_rate, cls_scale, **factory)
        self.apply(self._init_weights)


default_cfgs = generate_default_cfgs(
    {
        "flash_internimage_nano.untrained": make_cfg("FlashInternImage", resolution=64),
        **released_cfgs("FlashInternImage"),
    }
)


# Settings shared by S, B and L.
_POST_NORM = {"layer_scale": 1e-5, "post_norm": True, "dw_kernel_size": 3}

ARCHITECTURES = {
    "nano": {"channels": 32, "depths": (1, 1, 2, 1), "groups": (2, 4, 8, 16)},
    "tiny": {"channels": 64, "depths": (4, 4, 18, 4), "groups": (4, 8, 16, 32)},
    "small": {"channels": 80, "depths": (4, 4, 21, 4), "groups": (5, 10, 20, 40), **_POST_NORM},
    "base": {
        "channels": 112,
        "depths": (4, 4, 21, 4),
        "groups": (7, 14, 28, 56),
        "offset_scale": 0.5,
        **_POST_NORM,
    },
    "large": {
        "channels": 160,
        "depths": (5, 5, 22, 5),
        "groups": (10, 20, 40, 80),
        "offset_scale": 2.0,
        "dcn_output_bias": True,
        "mlp_fc2_bias": True,
        **_POST_NORM,
    },
}


def _create(arch: str, pretrained: bool, kwargs: dict) -> Any:
    name = f"flash_internimage_{arch}"
    return create(FlashInternImage, name, ARCHITECTURES[arch], pretrained, kwargs)


@register_model
def flash_internimage_nano(pretrained: bool = False, **kwargs: Any) -> FlashInternImage:
    """Create FlashInternImage-nano for demos and tests; it has no released weights.

    It has 1.7 M parameters with 10 classes.
    """
    return _create("nano", pretrained, kwargs)


@register_model
def flash_internimage_tiny(pretrained: bool = False, **kwargs: Any) -> FlashInternImage:
    """Create FlashInternImage-T."""
    return _create("tiny", pretrained, kwargs)


@register_model
def flash_internimage_small(pretrained: bool = False, **kwargs: Any) -> FlashInternImage:
    """Create FlashInternImage-S."""
    return _create("small", pretrained, kwargs)


@register_model
def flash_internimage_base(pretrained: bool = False, **kwargs: Any) -> FlashInternImage:
    """Create FlashInternImage-B."""
    return _create("base", pretrained, kwargs)


@register_model
def flash_internimage_large(pretrained: bool = False, **kwargs: Any) -> FlashInternImage:
    """Create FlashInternImage-L."""
    return _create("large", pretrained, kwargs)
