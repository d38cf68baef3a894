"""InternImage (DCNv3, arXiv:2211.05778), registered with timm.

Parameter names and shapes match the released checkpoints.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ops_dcnv4 import DCNv3

from .base import Backbone, check_classes, create, released_cfgs
from .blocks import layer_norm
from .clip_head import AttentionPooling

# Channels of the features that the attention pooling reads, its heads, and its output channels.
_CLIP_CHANNELS, _CLIP_HEADS, _CLIP_OUTPUT = 1024, 16, 768


class InternImage(Backbone):
    """InternImage backbone and classifier with feature maps at strides 4 to 32.

    Unlike FlashInternImage, its blocks contain DCNv3, whose offsets are predicted after a
    depth-wise convolution, a norm and an activation, and whose modulation is normalized by a
    softmax. The argument names are those of the published model.

    Args:
        in_chans: Number of input channels.
        num_classes: Number of classes; 0 omits the classifier.
        global_pool: Pooling before the classifier: 'avg', 'max', 'avgmax', 'catavgmax', or '' for
            none; with `use_clip_projector` 'map' (attention) or ''. None is 'avg' or 'map'.
        channels: Number of channels in the first stage, doubled in each following stage.
        depths: Number of blocks per stage.
        groups: Number of DCNv3 groups per stage.
        mlp_ratio: Ratio of hidden to input channels in the MLPs.
        drop_rate: Dropout rate before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; the rates increase linearly from 0.
        layer_scale: Initial value of the layer scale; None disables it.
        offset_scale: Factor on the offsets that DCNv3 predicts.
        post_norm: Normalize the output of each residual branch instead of its input.
        res_post_norm: Normalize the output of each residual branch as well as its input.
        dw_kernel_size: Kernel size of the depth-wise convolution in DCNv3.
        use_clip_projector: Before the classifier, pool the last two stages by attention; the sides
            of images must then be multiples of 32.
        level2_post_norm: Normalize the outputs of some blocks of the third stage.
        level2_post_norm_block_ids: Indices of these blocks.
        center_feature_scale: Blend the output of DCNv3 with the value by a learned gate.
        remove_center: Omit the center tap of the DCNv3 windows.
        cls_scale: Ratio of channels in the final 1x1 convolution to those of the last stage; has no
            effect with `use_clip_projector`.
        output_stride: Stride of the last stage; only 32 is supported.
        device: Device of the parameters. After 'meta', call `to_empty` and `init_weights`.
        dtype: Floating-point dtype of the parameters.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        channels: int = 64,
        depths: Sequence[int] = (4, 4, 18, 4),
        groups: Sequence[int] = (4, 8, 16, 32),
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale: float | None = None,
        offset_scale: float = 1.0,
        post_norm: bool = False,
        res_post_norm: bool = False,
        dw_kernel_size: int | None = None,
        use_clip_projector: bool = False,
        level2_post_norm: bool = False,
        level2_post_norm_block_ids: Sequence[int] | None = None,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        cls_scale: float = 1.5,
        output_stride: int = 32,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        if res_post_norm and (post_norm or layer_scale is not None):
            raise ValueError("res_post_norm must be False with post_norm or layer_scale, got True")
        ids = tuple(level2_post_norm_block_ids or ()) if level2_post_norm else ()
        if ids and not (len(depths) > 2 and {*ids} <= {*range(depths[2])}):
            raise ValueError(
                "level2_post_norm_block_ids must be indices of blocks of the third stage, got "
                f"{ids} for depths {tuple(depths)}"
            )
        super().__init__(
            in_chans,
            channels,
            depths,
            groups,
            make_dcn=lambda channels, groups: DCNv3(
                channels,
                group=groups,
                offset_scale=offset_scale,
                dw_kernel_size=dw_kernel_size,
                center_feature_scale=center_feature_scale,
                remove_center=remove_center,
                **factory,
            ),
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path_rate,
            stage_norm=not post_norm or center_feature_scale,
            output_stride=output_stride,
            norms_after={2: ids},
            layer_scale=layer_scale,
            post_norm=post_norm,
            res_post_norm=res_post_norm,
            mlp_fc2_bias=True,
            **factory,
        )
        self.use_clip_projector = use_clip_projector
        if global_pool is None:
            global_pool = "map" if use_clip_projector else "avg"
        if use_clip_projector:
            self._add_clip_head(num_classes, global_pool, drop_rate, **factory)
        else:
            self._add_conv_head(num_classes, global_pool, drop_rate, cls_scale, **factory)
        self.apply(self._init_weights)

    def _add_clip_head(
        self, num_classes: int, global_pool: str, drop_rate: float, **factory: Any
    ) -> None:
        """Add convolutions that fuse the last two stages, attention pooling and a classifier."""
        if len(self.levels) < 2:
            raise ValueError("depths must have two stages or more with use_clip_projector, got 1")
        self.num_classes = check_classes(num_classes, global_pool)
        self._set_pooling(global_pool)
        width, self.drop_rate = self.num_features, drop_rate
        self.dcnv3_head_x4: nn.Module = nn.Sequential(
            nn.Conv2d(width, 4 * _CLIP_CHANNELS, 1, **factory), nn.PixelShuffle(2)
        )
        self.dcnv3_head_x3: nn.Module = nn.Conv2d(width // 2, _CLIP_CHANNELS, 1, **factory)
        self.clip_projector: nn.Module = AttentionPooling(
            _CLIP_CHANNELS, _CLIP_HEADS, _CLIP_OUTPUT, **factory
        )
        self.fc_norm: nn.Module = nn.Sequential(layer_norm(_CLIP_OUTPUT, **factory))
        self.num_features, self.head_hidden_size = _CLIP_CHANNELS, _CLIP_OUTPUT
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._classifier(**factory)

    def _set_pooling(self, pool_type: str) -> None:
        if not self.use_clip_projector:
            return super()._set_pooling(pool_type)
        if pool_type not in ("map", ""):
            raise ValueError(
                f"global_pool must be 'map' or '' with use_clip_projector, got {pool_type!r}"
            )
        self.pool_type = pool_type

    def _classifier(self, **factory: Any) -> nn.Module:
        if not self.use_clip_projector:
            return super()._classifier(**factory)
        classes = self.num_classes
        return nn.Linear(_CLIP_OUTPUT, classes, **factory) if classes else nn.Identity()

    def _remove_head(self) -> None:
        if self.use_clip_projector:
            self.use_clip_projector = False
            self.dcnv3_head_x4 = self.dcnv3_head_x3 = nn.Identity()
            self.clip_projector = self.fc_norm = nn.Identity()
            self._set_pooling("")
        super()._remove_head()

    def _final_features(self, maps: list[Tensor]) -> Tensor:
        if not self.use_clip_projector or len(maps) < len(self.levels):
            return super()._final_features(maps)
        fine, coarse = maps[-2:]
        if fine.shape[2] != 2 * coarse.shape[2] or fine.shape[3] != 2 * coarse.shape[3]:
            raise ValueError(
                "x must be images whose sides are multiples of 32, got feature maps of "
                f"{tuple(fine.shape[2:])} and {tuple(coarse.shape[2:])}"
            )
        return self.dcnv3_head_x4(coarse) + self.dcnv3_head_x3(fine)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Apply the pooling, dropout and the classifier, after the final convolution if any.

        Args:
            x: Output of `forward_features`, (N, num_features, H, W).
            pre_logits: Return the input of the classifier instead of its output.

        Returns:
            Logits of shape (N, num_classes), or the input of the classifier.
        """
        if not self.use_clip_projector:
            return super().forward_head(x, pre_logits)
        if self.pool_type:
            x = self.head_drop(self.fc_norm(self.clip_projector(x)))
        return x if pre_logits else self.head(x)


default_cfgs = generate_default_cfgs(released_cfgs("InternImage"))

# Settings shared by S to XL, and by H and G.
_POST_NORM = {"layer_scale": 1e-5, "post_norm": True}
_CLIP = {"dw_kernel_size": 5, "center_feature_scale": True, "use_clip_projector": True}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "tiny": {"channels": 64, "depths": (4, 4, 18, 4), "groups": (4, 8, 16, 32)},
    "small": {"channels": 80, "depths": (4, 4, 21, 4), "groups": (5, 10, 20, 40), **_POST_NORM},
    "base": {"channels": 112, "depths": (4, 4, 21, 4), "groups": (7, 14, 28, 56), **_POST_NORM},
    "large": {
        "channels": 160,
        "depths": (5, 5, 22, 5),
        "groups": (10, 20, 40, 80),
        "offset_scale": 2.0,
        **_POST_NORM,
    },
    "xlarge": {
        "channels": 192,
        "depths": (5, 5, 24, 5),
        "groups": (12, 24, 48, 96),
        "offset_scale": 2.0,
        **_POST_NORM,
    },
    "huge": {
        "channels": 320,
        "depths": (6, 6, 32, 6),
        "groups": (10, 20, 40, 80),
        "res_post_norm": True,
        "level2_post_norm": True,
        "level2_post_norm_block_ids": (5, 11, 17, 23, 29),
        **_CLIP,
    },
    "giant": {
        "channels": 512,
        "depths": (2, 2, 48, 4),
        "groups": (16, 32, 64, 128),
        "post_norm": True,
        "level2_post_norm": True,
        "level2_post_norm_block_ids": tuple(range(5, 48, 6)),
        **_CLIP,
    },
}


def _create(arch: str, pretrained: bool, kwargs: dict) -> Any:
    return create(InternImage, f"internimage_{arch}", ARCHITECTURES[arch], pretrained, kwargs)


@register_model
def internimage_tiny(pretrained: bool = False, **kwargs: Any) -> InternImage:
    """Create InternImage-T."""
    return _create("tiny", pretrained, kwargs)


@register_model
def internimage_small(pretrained: bool = False, **kwargs: Any) -> InternImage:
    """Create InternImage-S."""
    return _create("small", pretrained, kwargs)


@register_model
def internimage_base(pretrained: bool = False, **kwargs: Any) -> InternImage:
    """Create InternImage-B."""
    return _create("base", pretrained, kwargs)


@register_model
def internimage_large(pretrained: bool = False, **kwargs: Any) -> InternImage:
    """Create InternImage-L."""
    return _create("large", pretrained, kwargs)


@register_model
def internimage_xlarge(pretrained: bool = False, **kwargs: Any) -> InternImage:
    """Create InternImage-XL."""
    return _create("xlarge", pretrained, kwargs)


@register_model
def internimage_huge(pretrained: bool = False, **kwargs: Any) -> InternImage:
    """Create InternImage-H."""
    return _create("huge", pretrained, kwargs)


@register_model
def internimage_giant(pretrained: bool = False, **kwargs: Any) -> InternImage:
    """Create InternImage-G."""
    return _create("giant", pretrained, kwargs)
