"""What FlashInternImage and InternImage have in common, and their creation by timm."""

import logging
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SelectAdaptivePool2d, calculate_drop_path_rates
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from timm.models._features import feature_take_indices
from timm.models._manipulate import MATCH_PREV_GROUP
from torch import Tensor, nn

from ops_dcnv4 import DCNv3, DCNv4

from ..checkpoints import read_pretrained, read_zoo
from ..checkpoints.weights import SOURCE
from ..checkpoints.zoo import PAPERS, Family
from .blocks import Block, Stage, Stem, to_channels_first

_logger = logging.getLogger(__name__)


def _integer(name: str, value: Any, minimum: int) -> int:
    try:
        number = operator.index(value)  # also accepts NumPy integers
    except TypeError:
        number = minimum - 1
    if number < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    return number


def _integers(name: str, values: Any) -> tuple[int, ...]:
    values = (tuple(values) or (0,)) if isinstance(values, Iterable) else (values,)
    return tuple(_integer(name, value, 1) for value in values)


def _pooling(pool_type: str) -> SelectAdaptivePool2d:
    try:
        return SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
    except AssertionError:
        raise ValueError(
            f"global_pool must be '', 'avg', 'max', 'avgmax' or 'catavgmax', got {pool_type!r}"
        ) from None


def check_classes(num_classes: Any, global_pool: str) -> int:
    """Return the number of classes as an int; a classifier requires a pooling."""
    num_classes = _integer("num_classes", num_classes, 0)
    if num_classes and not global_pool:
        raise ValueError(
            f"global_pool must be set for a classifier ({num_classes} classes), got {global_pool!r}"
        )
    return num_classes


class Backbone(nn.Module):
    """A stem, stages of residual blocks with feature maps at strides 4 to 32, and a classifier.

    A subclass adds its head at the end of its constructor and then initializes the weights.

    Args:
        in_chans: Number of input channels.
        channels: Number of channels in the first stage, doubled in each following stage.
        depths: Number of blocks per stage.
        groups: Number of groups of the deformable convolutions, per stage.
        make_dcn: Makes a deformable convolution from its numbers of channels and groups.
        mlp_ratio: Ratio of hidden to input channels in the MLPs.
        drop_path_rate: Stochastic depth rate of the last block; the rates increase linearly from 0.
        stage_norm: Normalize the output of each stage.
        norms_after: Indices of blocks whose outputs are normalized, for some stages.
        output_stride: Stride of the last stage; only 32 is supported.
        device: Device of the parameters.
        dtype: Floating-point dtype of the parameters.
        **block_args: Further arguments of :class:`~.blocks.Block`.

    Raises:
        ValueError: If an argument is out of range.
    """

    pretrained_cfg: dict[str, Any]  # set by timm
    conv_head: nn.Module
    global_pool: SelectAdaptivePool2d
    head: nn.Module

    def __init__(
        self,
        in_chans: int,
        channels: int,
        depths: Sequence[int],
        groups: Sequence[int],
        make_dcn: Callable[[int, int], nn.Module],
        mlp_ratio: float,
        drop_path_rate: float,
        stage_norm: bool,
        output_stride: int,
        norms_after: Mapping[int, Sequence[int]] | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **block_args: Any,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        in_chans = _integer("in_chans", in_chans, 1)
        channels = _integer("channels", channels, 2)
        depths, groups = _integers("depths", depths), _integers("groups", groups)
        if len(groups) != len(depths):
            raise ValueError(f"groups must have one entry per stage ({len(depths)}), got {groups}")
        if output_stride != 32:
            raise ValueError(f"output_stride must be 32, got {output_stride!r}")
        if not 0 <= drop_path_rate <= 1:
            raise ValueError(f"drop_path_rate must be between 0 and 1, got {drop_path_rate!r}")
        if not channels * mlp_ratio >= 1:
            raise ValueError(f"mlp_ratio must be positive, got {mlp_ratio!r}")
        self.in_chans = in_chans
        self.depths = depths
        self.patch_embed = Stem(in_chans, channels, **factory)
        self.levels = nn.ModuleList()
        # timm's hook and torch.fx feature extractors read the feature maps from these modules.
        self.feature_maps = nn.ModuleList(to_channels_first() for _ in depths)
        self.feature_info = []
        drop_path_rates: list[list[float]] = calculate_drop_path_rates(  # type: ignore[assignment]
            float(drop_path_rate), list(depths), stagewise=True
        )
        for i, rates in enumerate(drop_path_rates):
            width = channels * 2**i
            blocks = (
                Block(
                    width,
                    make_dcn(width, groups[i]),
                    mlp_ratio=mlp_ratio,
                    drop_path=rate,
                    **block_args,
                    **factory,
                )
                for rate in rates
            )
            stage = Stage(
                width,
                blocks,
                norm=stage_norm,
                downsample=i + 1 < len(depths),
                norms_after=(norms_after or {}).get(i, ()),
                **factory,
            )
            self.levels.append(stage)
            self.feature_info.append(
                {"num_chs": width, "reduction": 4 * 2**i, "module": f"feature_maps.{i}"}
            )
        self.num_features = self.head_hidden_size = self.feature_info[-1]["num_chs"]

    def _add_conv_head(
        self, num_classes: int, global_pool: str, drop_rate: float, cls_scale: float, **factory: Any
    ) -> None:
        """Add a 1x1 convolution, a pooling and a classifier."""
        if not self.num_features * cls_scale >= 1:
            raise ValueError(f"cls_scale must be positive, got {cls_scale!r}")
        self.num_classes = check_classes(num_classes, global_pool)
        self.drop_rate = drop_rate
        self.head_hidden_size = int(self.num_features * cls_scale)
        self.conv_head = nn.Sequential(
            nn.Conv2d(self.num_features, self.head_hidden_size, 1, bias=False, **factory),
            nn.Sequential(nn.BatchNorm2d(self.head_hidden_size, **factory)),
            nn.GELU(),
        )
        self._set_pooling(global_pool)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._classifier(**factory)

    def init_weights(self) -> None:
        """Initialize all parameters and buffers, for example after creation on the meta device."""
        for module in self.modules():
            if callable(reset_parameters := getattr(module, "reset_parameters", None)):
                reset_parameters()
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        # nn.Module.apply visits children first, so DCNv3 and DCNv4 re-initialize their own layers.
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (DCNv3, DCNv4)):
            module.reset_parameters()

    def _set_pooling(self, pool_type: str) -> None:
        self.global_pool, self.pool_type = _pooling(pool_type), pool_type

    def _classifier(self, **factory: Any) -> nn.Module:
        pooled = self.head_hidden_size * self.global_pool.feat_mult()
        return nn.Linear(pooled, self.num_classes, **factory) if self.num_classes else nn.Identity()

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return an empty set, as timm's optimizer factory already exempts 1-D parameters."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Return the parameter groups for timm's layer-wise learning-rate decay.

        The default groups are those of the published layer decay: every block is a layer. The stem,
        the norm after a stage and downsampling belong to the block that follows, and the head
        belongs to the last block. A norm after a block within a stage belongs to that block.

        Args:
            coarse: Group by stage instead of by block.
        """
        last = len(self.levels) - 1  # self.depths also counts pruned stages
        head = "^(?:conv_head|dcnv3_head|clip_projector|fc_norm|head)"
        if coarse:
            return {"stem": r"^patch_embed", "blocks": r"^levels\.(\d+)", "head": head}
        head = rf"^levels\.{last}\.norm|{head}"
        after = [
            (rf"^levels\.{i}\.post_norms\.{j}\.", (i, block))
            for i, stage in enumerate(self.levels)
            for j, block in enumerate(stage.norms_after)  # type: ignore[arg-type]
        ]
        between = [(rf"^levels\.{i}\.(?:norm|downsample)", (i + 1, 0)) for i in range(last)]
        return {
            "blocks": [
                (r"^patch_embed", (0, 0)),
                (r"^levels\.(\d+)\.blocks\.(\d+)", None),
                *after,
                *between,
                (head, (last + 1, *MATCH_PREV_GROUP)),
            ]
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of storing its activations."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the classifier, an `nn.Identity` if there are no classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier.

        Args:
            num_classes: Number of classes; 0 omits the classifier.
            global_pool: Pooling as in the constructor; None keeps the current one.

        Raises:
            ValueError: If an argument is out of range, as in the constructor.
        """
        if global_pool is None:
            global_pool = self.pool_type
        num_classes = check_classes(num_classes, global_pool)
        self._set_pooling(global_pool)
        self.num_classes = num_classes
        weight = self.patch_embed.conv1.weight
        self.head = self._classifier(device=weight.device, dtype=weight.dtype)
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
        """Return the feature maps of selected stages.

        Args:
            x: Images of shape (N, C_in, H, W).
            indices: Stages to return; the last n if an int, all if None.
            norm: Has no effect, as the features of every stage are already normalized.
            stop_early: Skip the stages after the last selected one.
            output_fmt: Layout of the feature maps, 'NCHW' or 'NHWC'.
            intermediates_only: Return only the feature maps.

        Returns:
            Tuple of the final features, always (N, C, H, W), and the list of feature maps; only the
            list if `intermediates_only`.

        Raises:
            ValueError: If `output_fmt` is neither 'NCHW' nor 'NHWC'.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.levels), indices)
        maps = self._feature_maps(x, max_index + 1 if stop_early else len(self.levels))
        intermediates = [maps[i] for i in take_indices]
        if output_fmt == "NHWC":
            intermediates = [feature_map.permute(0, 2, 3, 1) for feature_map in intermediates]
        return intermediates if intermediates_only else (self._final_features(maps), intermediates)

    def _feature_maps(self, x: Tensor, stages: int) -> list[Tensor]:
        """Return the feature maps (N, C, H, W) of the first stages."""
        x, maps = self.patch_embed(x), []
        for i, stage in enumerate(self.levels[:stages]):
            x = stage(x)
            maps.append(self.feature_maps[i](x))
            if i + 1 < stages:
                x = stage.downsample(x)  # type: ignore[operator]
        return maps

    def _final_features(self, maps: list[Tensor]) -> Tensor:
        """Return the input of the head, given the feature maps of the stages."""
        return maps[-1]

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the layers after the last of the selected stages.

        Args:
            indices: Stages to select, as in :meth:`forward_intermediates`.
            prune_norm: Has no effect.
            prune_head: Remove the head even if no stage is removed.

        Returns:
            Indices of the selected stages.
        """
        take_indices, max_index = feature_take_indices(len(self.levels), indices)
        pruned = max_index + 1 < len(self.levels)
        self.levels = self.levels[: max_index + 1]
        self.feature_maps = self.feature_maps[: max_index + 1]
        self.levels[-1].downsample = nn.Identity()
        if prune_head or pruned:
            self.reset_classifier(0, "")
            self._remove_head()
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        return take_indices

    def _remove_head(self) -> None:
        self.conv_head = nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the features of the last stage.

        Args:
            x: Images of shape (N, C_in, H, W).

        Returns:
            Features of shape (N, num_features, H/32, W/32).
        """
        return self._final_features(self._feature_maps(x, len(self.levels)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Apply the final convolution, pooling, dropout and the classifier.

        Args:
            x: Features of the last stage, (N, num_features, H, W).
            pre_logits: Return the input of the classifier instead of its output.

        Returns:
            Logits of shape (N, num_classes), or the input of the classifier.
        """
        x = self.head_drop(self.global_pool(self.conv_head(x)))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, num_classes) of images (N, C_in, H, W)."""
        return self.forward_head(self.forward_features(x))


def make_cfg(
    family: Family, url: str = "", resolution: int = 224, num_classes: int | None = 1000
) -> dict[str, Any]:
    """Return the pretrained config of a model for timm.

    Args:
        family: Family of the model.
        url: Address of the weights; '' if there are none.
        resolution: Height and width of images.
        num_classes: Number of classes of the weights.
    """
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
        "origin_url": f"https://github.com/{PAPERS[family].repository}",
        "paper_ids": f"arXiv:{PAPERS[family].arxiv}",
    }


def released_cfgs(family: Family) -> dict[str, Any]:
    """Return the pretrained configs of the released classifiers of a family, by their names."""
    return {
        name: make_cfg(family, entry.addresses[0], entry.resolution, entry.classes)
        for name, entry in read_zoo().items()
        if entry.task == "classification" and entry.family == family
    }


# Entries of timm's pretrained configs that say where the weights are.
_SOURCES = {"file", "url", "hf_hub_id", "state_dict"}


def _check_out_indices(indices: Any, stages: int) -> None:
    if isinstance(indices, int):
        return
    positions = [index % stages for index in indices if -stages <= index < stages]
    if not indices or len(positions) < len(indices) or positions != sorted({*positions}):
        raise ValueError(
            f"out_indices must be ascending stages from 0 to {stages - 1}, got {tuple(indices)}"
        )


def create(
    model: type[Backbone],
    name: str,
    architecture: Mapping[str, Any],
    pretrained: bool,
    kwargs: dict[str, Any],
) -> Any:
    """Create a model with timm.

    Args:
        model: Class of the model.
        name: Name of the model in timm.
        architecture: Arguments of the class that define the model.
        pretrained: Load the weights that the pretrained config names.
        kwargs: Further arguments of the model and of `timm.create_model`; changed in place.

    Raises:
        ValueError: If an argument of timm is not supported.
    """
    overlay = kwargs.pop("pretrained_cfg_overlay", None)
    cfg = resolve_pretrained_cfg(name, kwargs.pop("pretrained_cfg", None), overlay)
    if ignored := [] if pretrained else sorted({*(overlay or ())} & _SOURCES):
        _logger.warning(
            "%s of pretrained_cfg_overlay has no effect without pretrained=True", ignored[0]
        )
    cfg = replace(cfg, first_conv="patch_embed.conv1", classifier="head")
    if pretrained and cfg.custom_load:
        raise ValueError(f"custom_load must be False for {name}, got {cfg.custom_load!r}")
    # timm itself loads from hub ids and from `local-dir:` folders.
    source = cfg.file or (None if cfg.hf_hub_id else cfg.url)
    if pretrained and source and not (cfg.source or cfg.state_dict):
        cfg = replace(cfg, state_dict={SOURCE: source})
    feature_cfg = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
    feature_cfg |= kwargs.pop("feature_cfg", {})
    feature_cls = kwargs.get("feature_cls", feature_cfg["feature_cls"])
    if isinstance(feature_cls, str) and feature_cls.lower() not in ("getter", "hook", "fx"):
        raise ValueError(f"feature_cls must be 'getter', 'hook' or 'fx', got {feature_cls!r}")
    if kwargs.get("features_only", False):
        stages = len(kwargs.get("depths", architecture["depths"]))
        _check_out_indices(kwargs.get("out_indices", feature_cfg["out_indices"]), stages)
    return build_model_with_cfg(
        model,
        name,
        pretrained,
        pretrained_cfg=cfg.to_dict(),
        pretrained_filter_fn=partial(
            read_pretrained,
            features_only=kwargs.get("features_only", False),
            strict=kwargs.get("pretrained_strict", True),
            cache_dir=kwargs.get("cache_dir"),
        ),
        feature_cfg=feature_cfg,
        **{**architecture, **kwargs},
    )
