"""FlashInternImage and InternImage as backbones of OpenMMLab's detectors and segmentors."""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from mmengine.model import BaseModule
from mmengine.registry import MODELS, WEIGHT_INITIALIZERS
from torch import Tensor, nn

from ...backbones import Backbone, FlashInternImage, InternImage, flash_internimage, intern_image
from ...checkpoints import check_state_dict, clean_state_dict
from ...checkpoints.weights import HEAD
from ..safe_loading import read_checkpoint
from ..utils import log_info
from .published_weights import warn_of_mismatches


class DenseBackbone(Backbone, BaseModule):
    """Backbone without its classifier, returning a tuple of feature maps.

    Subclasses also derive from a class of :mod:`flash_internimage.backbones`.

    Attributes:
        architectures: Arguments of the model by the name of its size.
    """

    architectures: ClassVar[Mapping[str, Mapping[str, Any]]]
    is_init: bool

    def __init__(
        self,
        arch: str | None = None,
        *,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        with_cp: bool = False,
        init_cfg: dict | None = None,
        **kwargs: Any,
    ) -> None:
        if arch is not None and arch not in self.architectures:
            raise ValueError(f"arch must be one of {', '.join(self.architectures)}, got {arch!r}")
        architecture = {**self.architectures[arch]} if arch else {}
        given = {**architecture, **kwargs}
        is_without = given.get("use_clip_projector") or given.get("res_post_norm")
        layer_scale = None if is_without else 1.0
        arguments = {**architecture, "layer_scale": layer_scale, **kwargs, "num_classes": 0}
        super().__init__(**arguments)
        stages = len(self.levels)
        if list(out_indices) != sorted(set(out_indices) & set(range(stages))) or not out_indices:
            raise ValueError(
                f"out_indices must be ascending stages from 0 to {stages - 1}, got {out_indices}"
            )
        if frozen_stages not in range(-1, stages + 1):
            raise ValueError(
                f"frozen_stages must be an integer from -1 to {stages}, got {frozen_stages}"
            )
        _check_init_cfg(init_cfg)
        self.init_cfg = copy.deepcopy(init_cfg)
        self.layer_scale = arguments["layer_scale"]
        self.out_indices = tuple(out_indices)
        self.prune_intermediate_layers([*out_indices])
        del self.num_classes  # mmdet's NumClassCheckHook would compare it with the data.
        self.set_grad_checkpointing(with_cp)
        self.frozen_stages = frozen_stages
        for module in self._frozen():
            module.requires_grad_(False)

    def _frozen(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        return [self.patch_embed, *self.levels[: self.frozen_stages]]

    def train(self, mode: bool = True) -> "DenseBackbone":
        """Set the training mode, except for frozen parts, which stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def init_weights(self) -> None:
        """Load the weights given by `init_cfg`, if any.

        Raises:
            FileNotFoundError: If the checkpoint does not exist.
            ValueError: If a parameter is missing in the checkpoint, unexpected, or of another
                shape, or no name in the checkpoint begins with the prefix.
        """
        if self.init_cfg is None or self.is_init:
            return
        source = self.init_cfg["checkpoint"]
        own = self.state_dict()
        checkpoint = read_checkpoint(source, self.init_cfg.get("map_location", "cpu"))
        weights = clean_state_dict(checkpoint, prefix=self.init_cfg.get("prefix"))
        weights = {name: weight for name, weight in weights.items() if not self._left_out(name)}
        if self.layer_scale == 1.0 and not any("gamma" in name for name in weights):
            weights |= {name: weight for name, weight in own.items() if "gamma" in name}
        check_state_dict(own, weights)
        self.load_state_dict(weights)
        log_info(f"backbone initialized from {source}")
        self.is_init = True

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        warn_of_mismatches(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _left_out(self, name: str) -> bool:
        """Return whether a classifier's parameter belongs to a part that this backbone lacks."""
        stages = len(self.levels)
        level = re.match(r"levels\.(\d+)\.", name)
        return name.startswith((*HEAD, f"levels.{stages - 1}.downsample.")) or (
            level is not None and int(level[1]) >= stages
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Compute the feature maps of a batch of images.

        Args:
            x: Images, (N, 3, H, W).

        Returns:
            A feature map (N, C * 2**i, H / 2**(i+2), W / 2**(i+2)) for each i in `out_indices`.
        """
        maps: Any = self.forward_intermediates(x, [*self.out_indices], intermediates_only=True)
        # mmcv's RoIAlign assumes that memory is laid out as (N, C, H, W), and convolutions preserve
        # other layouts.
        return tuple(x.contiguous() for x in maps)


@MODELS.register_module("FlashInternImage")
class FlashInternImageBackbone(DenseBackbone, FlashInternImage):
    """FlashInternImage without its classifier, returning a tuple of feature maps.

    Args:
        arch: 'nano', 'tiny', 'small', 'base' or 'large'. Individual arguments override its values.
        out_indices: Ascending indices of the stages to return. Later stages are removed.
        frozen_stages: -1 freezes nothing, 0 the stem, and n the stem and the first n stages. Frozen
            parts have no gradients and no stochastic depth.
        with_cp: Whether to recompute each block in the backward pass instead of storing its
            activations (gradient checkpointing).
        layer_scale: Initial value of the layer scale. The published detectors and segmentors of all
            sizes are trained with 1.0, which is kept if a checkpoint has no layer scale.
        init_cfg: `dict(type='Pretrained', checkpoint=...)` with a path, a URL or the name of
            released weights, see :func:`flash_internimage.checkpoints.fetch_checkpoint`. `prefix`
            and `map_location` mean what they mean to mmengine's `PretrainedInit`. Without `prefix`,
            the backbone is found in the weights of a classifier, detector or segmentor.
        kwargs: Arguments of :class:`flash_internimage.FlashInternImage`.

    Raises:
        ValueError: If an argument is out of range. The message names it.
    """

    architectures = flash_internimage.ARCHITECTURES


@MODELS.register_module("InternImage")
class InternImageBackbone(DenseBackbone, InternImage):
    """InternImage without its classifier, returning a tuple of feature maps.

    Args:
        arch: 'tiny', 'small', 'base', 'large', 'xlarge', 'huge' or 'giant'. Individual arguments
            override its values.
        layer_scale: Initial value of the layer scale. The published detectors and segmentors are
            trained with 1.0, the default, which is kept if a checkpoint has no layer scale; those
            of sizes H and G have none, and None is their default.
        kwargs: Arguments of :class:`flash_internimage.InternImage`. `out_indices`, `frozen_stages`,
            `with_cp` and `init_cfg` are those of :class:`FlashInternImageBackbone`.

    Raises:
        ValueError: If an argument is out of range. The message names it.
    """

    architectures = intern_image.ARCHITECTURES


def _check_init_cfg(init_cfg: dict | None) -> None:
    if init_cfg is None:
        return
    accepted = "init_cfg must be dict(type='Pretrained', checkpoint=...)"
    kinds = ("Pretrained", WEIGHT_INITIALIZERS.get("Pretrained"))
    if (
        not isinstance(init_cfg, dict)
        or init_cfg.get("type") not in kinds
        or "checkpoint" not in init_cfg
    ):
        raise ValueError(f"{accepted}, got {init_cfg}")
    if unknown := init_cfg.keys() - {"type", "checkpoint", "prefix", "map_location"}:
        raise ValueError(f"{accepted}, got the unknown key {', '.join(sorted(map(repr, unknown)))}")
    if not isinstance(prefix := init_cfg.get("prefix"), str | None):
        raise ValueError(f"init_cfg's prefix must be a string, got {prefix!r}")
