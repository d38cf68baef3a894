"""FlashInternImage (DCNv4, arXiv:2401.06197), registered with timm.

Parameter names and shapes are those of the released checkpoints.
"""

from dataclasses import replace
from functools import partial

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, Mlp, SelectAdaptivePool2d, calculate_drop_path_rates
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models._features import feature_take_indices
from timm.models._manipulate import MATCH_PREV_GROUP, checkpoint
from torch import Tensor, nn
from torchvision.ops import Permute

from ops_dcnv4 import DCNv4

from .checkpoint import SOURCE, read_pretrained
from .pretrained import RELEASED


def to_channels_last() -> Permute:
    return Permute([0, 2, 3, 1])


def layer_norm(channels: int) -> nn.LayerNorm:
    return nn.LayerNorm(channels, eps=1e-6)


def _pooling(pool_type: str) -> SelectAdaptivePool2d:
    return SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))


class Stem(nn.Module):
    """(N, C_in, H, W) -> (N, H/4, W/4, C)."""

    def __init__(self, in_chans: int, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, channels // 2, kernel_size=3, stride=2, padding=1)
        self.norm1 = nn.Sequential(
            to_channels_last(), layer_norm(channels // 2), Permute([0, 3, 1, 2])
        )
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(channels // 2, channels, kernel_size=3, stride=2, padding=1)
        self.norm2 = nn.Sequential(to_channels_last(), layer_norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))


class Downsample(nn.Module):
    """(N, H, W, C) -> (N, H/2, W/2, 2*C)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(
            channels, 2 * channels, kernel_size=3, stride=2, padding=1, bias=False
        )
        self.norm = nn.Sequential(to_channels_last(), layer_norm(2 * channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)))


class Block(nn.Module):
    """DCNv4 and MLP with residual connections, on (N, H, W, C)."""

    def __init__(
        self,
        channels: int,
        groups: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        offset_scale: float = 1.0,
        post_norm: bool = False,
        dw_kernel_size: int | None = None,
        dcn_output_bias: bool = False,
        mlp_fc2_bias: bool = False,
    ):
        super().__init__()
        self.post_norm = post_norm
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((channels,), layer_scale))
            self.gamma2 = nn.Parameter(torch.full((channels,), layer_scale))
        else:
            self.gamma1 = self.gamma2 = None
        self.norm1 = nn.Sequential(layer_norm(channels))
        self.dcn = DCNv4(
            channels,
            group=groups,
            offset_scale=offset_scale,
            dw_kernel_size=dw_kernel_size,
            output_bias=dcn_output_bias,
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.Sequential(layer_norm(channels))
        self.mlp = Mlp(channels, int(channels * mlp_ratio), bias=(True, mlp_fc2_bias))

    def _branch(self, x: Tensor, layer: nn.Module, norm: nn.Module, gamma: Tensor | None) -> Tensor:
        out = norm(layer(x)) if self.post_norm else layer(norm(x))
        return self.drop_path(out if gamma is None else gamma * out)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._branch(x, self.dcn, self.norm1, self.gamma1)
        return x + self._branch(x, self.mlp, self.norm2, self.gamma2)


class Stage(nn.Module):
    """Blocks and, without post-norm, a closing norm. `downsample` leads to the next stage."""

    def __init__(
        self,
        channels: int,
        groups: int,
        drop_path_rates: list[float],
        downsample: bool,
        post_norm: bool = False,
        **block_args,
    ):
        super().__init__()
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList(
            Block(channels, groups, drop_path=rate, post_norm=post_norm, **block_args)
            for rate in drop_path_rates
        )
        self.norm = nn.Identity() if post_norm else nn.Sequential(layer_norm(channels))
        self.downsample = Downsample(channels) if downsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            recompute = self.grad_checkpointing and x.requires_grad
            x = checkpoint(block, x) if recompute else block(x)
        return self.norm(x)


class FlashInternImage(nn.Module):
    """FlashInternImage, an image classifier and a backbone with feature maps at strides 4 to 32.

    Args:
        in_chans: channels of the input image.
        num_classes: of the classifier; 0 leaves it out.
        global_pool: pooling before the classifier, '' for none.
        channels: of the first stage; each stage doubles them.
        depths: blocks per stage.
        groups: DCNv4 groups per stage.
        mlp_ratio: hidden over input channels of the MLPs.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, rising linearly from 0.
        layer_scale: initial value of the residual branches' scales, None for no scales.
        offset_scale: of DCNv4.
        post_norm: normalise the output of each branch instead of its input.
        dw_kernel_size: of DCNv4.
        dcn_output_bias: bias of DCNv4's output projection.
        mlp_fc2_bias: bias of the MLP's second layer.
        cls_scale: channels of the last convolution over those of the last stage.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        channels: int = 64,
        depths: tuple[int, ...] = (4, 4, 18, 4),
        groups: tuple[int, ...] = (4, 8, 16, 32),
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
    ):
        super().__init__()
        if len(groups) != len(depths):
            raise ValueError(f"groups must have one entry per stage ({len(depths)}), got {groups}")
        if num_classes and not global_pool:
            raise ValueError(f"global_pool must be set for a classifier of {num_classes} classes")
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self.depths = tuple(depths)
        self.num_features = channels * 2 ** (len(depths) - 1)
        self.head_hidden_size = int(self.num_features * cls_scale)

        self.patch_embed = Stem(in_chans, channels)
        self.levels = nn.ModuleList()
        self.feature_info = []
        drop_path_rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        for i, rates in enumerate(drop_path_rates):
            stage = Stage(
                channels * 2**i,
                groups[i],
                rates,
                downsample=i + 1 < len(depths),
                post_norm=post_norm,
                mlp_ratio=mlp_ratio,
                layer_scale=layer_scale,
                offset_scale=offset_scale,
                dw_kernel_size=dw_kernel_size,
                dcn_output_bias=dcn_output_bias,
                mlp_fc2_bias=mlp_fc2_bias,
            )
            self.levels.append(stage)
            self.feature_info.append(
                {"num_chs": channels * 2**i, "reduction": 4 * 2**i, "module": f"levels.{i}"}
            )

        self.conv_head = nn.Sequential(
            nn.Conv2d(self.num_features, self.head_hidden_size, kernel_size=1, bias=False),
            nn.Sequential(nn.BatchNorm2d(self.head_hidden_size)),
            nn.GELU(),
        )
        self.global_pool = _pooling(global_pool)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._classifier(num_classes)
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        # nn.Module.apply visits children first: DCNv4 has the last word on its linear layers.
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, DCNv4):
            module.reset_parameters()

    def _classifier(self, num_classes: int) -> nn.Module:
        pooled = self.head_hidden_size * self.global_pool.feat_mult()
        return nn.Linear(pooled, num_classes) if num_classes else nn.Identity()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Nothing beyond the 1-D parameters, which timm's optimizer factory exempts."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """timm's parameter grouping. The fine one is that of the published layer decay: one layer
        per block; stem, norms and downsampling go with the next block, the head with the last.
        """
        head = rf"^levels\.{len(self.depths) - 1}\.norm|^conv_head|^head"
        if coarse:
            return {"stem": r"^patch_embed", "blocks": r"^levels\.(\d+)", "head": "^(?:conv_)?head"}
        between = [
            (rf"^levels\.{i}\.(?:norm|downsample)", (i + 1, 0)) for i in range(len(self.depths) - 1)
        ]
        return {
            "blocks": [
                (r"^patch_embed", (0, 0)),
                (r"^levels\.(\d+)\.blocks\.(\d+)", None),
                *between,
                (head, (len(self.depths), *MATCH_PREV_GROUP)),
            ]
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for stage in self.levels:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier of `num_classes` classes, 0 for none; the pooling changes if given."""
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = _pooling(global_pool)
        self.head = self._classifier(num_classes).to(self.patch_embed.conv1.weight)
        self._init_weights(self.head)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The feature maps of the stages, with timm's arguments and results.

        Args:
            x: (N, C_in, H, W).
            indices: stages to return; the last n if an int, all if None.
            norm: without effect: every stage's features are already normalised.
            output_fmt: 'NCHW' or 'NHWC', of the feature maps.

        Returns:
            The feature maps, or (final features, feature maps) unless `intermediates_only`.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.levels), indices)
        levels = self.levels[: max_index + 1] if stop_early else self.levels
        intermediates = []
        x = self.patch_embed(x)
        for i, stage in enumerate(levels):
            x = stage(x)
            if i in take_indices:
                intermediates.append(x.permute(0, 3, 1, 2) if output_fmt == "NCHW" else x)
            if i + 1 < len(levels):
                x = stage.downsample(x)
        if intermediates_only:
            return intermediates
        return x.permute(0, 3, 1, 2), intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop what the given stages' feature maps do not need; returns the indices kept."""
        take_indices, max_index = feature_take_indices(len(self.levels), indices)
        pruned = max_index + 1 < len(self.levels)
        self.levels = self.levels[: max_index + 1]
        self.levels[-1].downsample = nn.Identity()
        if prune_head or pruned:
            self.reset_classifier(0, "")
            self.conv_head = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, num_features, H/32, W/32)."""
        x = self.patch_embed(x)
        for stage in self.levels:
            x = stage.downsample(stage(x))
        return x.permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.global_pool(self.conv_head(x)))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _cfg(url: str = "", resolution: int = 224, num_classes: int = 1000) -> dict:
    return {
        "url": url,
        "num_classes": num_classes,
        "input_size": (3, resolution, resolution),
        "pool_size": (resolution // 32, resolution // 32),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.conv1",
        "classifier": "head",
        "license": "mit",
        "origin_url": "https://github.com/OpenGVLab/DCNv4",
        "paper_ids": "arXiv:2401.06197",
    }


default_cfgs = generate_default_cfgs(
    {"flash_internimage_nano.untrained": _cfg(resolution=64)}
    | {name: _cfg(*released) for name, released in RELEASED.items()}
)


# What the released S, B and L share.
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


def _create(arch: str, pretrained: bool, kwargs: dict) -> FlashInternImage:
    name = f"flash_internimage_{arch}"
    cfg = resolve_pretrained_cfg(
        name, kwargs.pop("pretrained_cfg", None), kwargs.pop("pretrained_cfg_overlay", None)
    )
    features_only = kwargs.get("features_only", False)
    source = (cfg.file or cfg.url) if not (cfg.source or cfg.state_dict) else None
    if pretrained and source:
        cfg = replace(cfg, state_dict={SOURCE: source})
    return build_model_with_cfg(
        FlashInternImage,
        name,
        pretrained,
        pretrained_cfg=cfg.to_dict(),
        pretrained_filter_fn=partial(read_pretrained, features_only=features_only),
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{**ARCHITECTURES[arch], **kwargs},
    )


@register_model
def flash_internimage_nano(pretrained: bool = False, **kwargs) -> FlashInternImage:
    """1.7 M parameters with 10 classes, for demos and tests; there are no released weights."""
    return _create("nano", pretrained, kwargs)


@register_model
def flash_internimage_tiny(pretrained: bool = False, **kwargs) -> FlashInternImage:
    return _create("tiny", pretrained, kwargs)


@register_model
def flash_internimage_small(pretrained: bool = False, **kwargs) -> FlashInternImage:
    return _create("small", pretrained, kwargs)


@register_model
def flash_internimage_base(pretrained: bool = False, **kwargs) -> FlashInternImage:
    return _create("base", pretrained, kwargs)


@register_model
def flash_internimage_large(pretrained: bool = False, **kwargs) -> FlashInternImage:
    return _create("large", pretrained, kwargs)
