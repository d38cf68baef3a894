"""Layer-wise learning rate decay, as used to train the published detectors and segmentors."""

import re
from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from ....backbones import Backbone
from ...utils import log_debug, log_info

# The level embedding of Deformable DETR and DINO has the learning rate of patch_embed.
_FIRST_LAYER = ("backbone.patch_embed", "level_embed")
# The published segmentors did not count the offsets of heads. It makes no difference, since none of
# them scales offsets.
_OFFSETS = re.compile(r"\boffset_mask\b|sampling_offsets|reference_points|offset$")
_NO_WEIGHT_DECAY = re.compile(r"\.bias$|norm|relative_position|sampling_offsets")


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class InternImageLayerDecayOptimizerConstructor(DefaultOptimWrapperConstructor):
    """Build optimizers with layer-wise learning rate decay for (Flash)InternImage backbones.

    In a backbone of n blocks, the learning rate of `patch_embed` is multiplied by
    `layer_decay_rate ** (n + 1)`, that of the first block by `layer_decay_rate ** n`, that of the
    last block by `layer_decay_rate`, and that of neck and heads by 1. Norms and downsampling layers
    between stages belong to the following block, the last norm to the first block of its stage, and
    `post_norms` within a stage to the block before. The `level_embed` of a detector is treated like
    `patch_embed`.

    Vectors, biases, norms and the `sampling_offsets` of deformable attention have no weight decay.
    There is one parameter group per learning rate and weight decay. mmengine's schedules multiply
    the learning rates of all groups alike.

    Args:
        optim_wrapper_cfg: Config of the optimizer wrapper. Its `optimizer` must have `lr` and
            `weight_decay`.
        paramwise_cfg: A dict with the following entries:

            - layer_decay_rate: Greater than 0 and at most 1.
            - num_layers (optional): Number of blocks of the backbone, as a safeguard.
            - offset_lr_scale (default 1): Factor for the learning rate of layers that predict
              where to sample: `offset_mask` of DCNv4, and `sampling_offsets` and `reference_points`
              of deformable attention. As published, it does not apply to `offset` of DCNv3.
            - first_layer (default none): Names of further parameters or modules that share the
              learning rate of `patch_embed`, such as 'decode_head.query_embed'.

    Raises:
        ValueError: If an option is unknown, missing, out of range, or does not match the model. The
            message names it.

    Example::

        optim_wrapper = dict(
            type='OptimWrapper',
            constructor='InternImageLayerDecayOptimizerConstructor',
            optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
            paramwise_cfg=dict(layer_decay_rate=0.9),
        )
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        for key in ("lr", "weight_decay"):
            if self.optimizer_cfg.get(key) is None:
                raise ValueError(f"optimizer must have {key}, got {self.optimizer_cfg}")
        accepted = ("layer_decay_rate", "num_layers", "offset_lr_scale", "first_layer")
        unknown = [key for key in self.paramwise_cfg if key not in accepted]
        if unknown:
            raise ValueError(
                f"paramwise_cfg must only have {', '.join(accepted)}, got {', '.join(unknown)}"
            )
        self.layer_decay_rate = self.paramwise_cfg.get("layer_decay_rate")
        self.num_layers = self.paramwise_cfg.get("num_layers")
        self.offset_lr_scale = self.paramwise_cfg.get("offset_lr_scale", 1.0)
        self.first_layer = self.paramwise_cfg.get("first_layer", ())
        if not isinstance(self.layer_decay_rate, int | float) or not 0 < self.layer_decay_rate <= 1:
            raise ValueError(
                "paramwise_cfg.layer_decay_rate must be greater than 0 and at most 1, "
                f"got {self.layer_decay_rate!r}"
            )
        if not isinstance(self.offset_lr_scale, int | float) or not self.offset_lr_scale >= 0:
            raise ValueError(f"offset_lr_scale must be at least 0, got {self.offset_lr_scale!r}")
        if not isinstance(self.first_layer, list | tuple):
            raise ValueError(f"first_layer must be a list of names, got {self.first_layer!r}")

    def add_params(self, params: list[dict], module: nn.Module, **kwargs: Any) -> None:
        """Append the parameter groups of a model to `params`.

        Args:
            params: List to append to.
            module: Model whose attribute `backbone` is a FlashInternImage or InternImage.
                Parameters that require no gradient are left out.
            **kwargs: Unused.

        Raises:
            ValueError: If an option does not match the model.
        """
        backbone = getattr(module, "backbone", None)
        if not isinstance(backbone, Backbone):
            raise ValueError(
                "model.backbone must be a FlashInternImage or InternImage, got "
                f"{type(backbone).__name__} in {type(module).__name__}; for other backbones, set "
                "optim_wrapper.constructor to 'DefaultOptimWrapperConstructor' and its own "
                "paramwise_cfg"
            )
        num_layers = sum(backbone.depths)
        if self.num_layers not in (None, num_layers):
            raise ValueError(
                f"num_layers must be the backbone's number of blocks, {num_layers} "
                f"{backbone.depths}, or be left out, got {self.num_layers!r}"
            )
        self._require_names(module)

        groups: dict[tuple[float, float], dict[str, Any]] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            layer = self._get_layer_id(name, backbone)
            scale = self.layer_decay_rate ** (num_layers + 1 - layer)
            if _OFFSETS.search(name):
                scale *= self.offset_lr_scale
            exempt = parameter.ndim < 2 or _NO_WEIGHT_DECAY.search(name)
            weight_decay = 0.0 if exempt else self.base_wd
            group = groups.setdefault(
                (scale, weight_decay),
                {
                    "params": [],
                    "lr": self.base_lr * scale,
                    "weight_decay": weight_decay,
                    "lr_scale": scale,
                    "group_name": f"lr x {scale:.4g}, weight decay {weight_decay:g}",
                },
            )
            group["params"].append(parameter)
        params.extend(groups.values())
        log_info(
            f"{len(groups)} parameter groups with a layer-wise learning rate decay of "
            f"{self.layer_decay_rate} over {num_layers} blocks"
        )
        for group in groups.values():
            size = len(group["params"])
            log_debug(f"{group['group_name']}: lr {group['lr']:.4g}, {size} tensors")

    def _get_layer_id(self, name: str, backbone: Backbone) -> int:
        """Return 0 for patch_embed, 1 for the first block, up to sum(depths) + 1 for the heads."""
        depths = backbone.depths
        if any(_is_in(name, first) for first in (*_FIRST_LAYER, *self.first_layer)):
            return 0
        found = re.match(r"backbone\.levels\.(\d+)\.(?:(blocks|post_norms)\.(\d+)\.)?", name)
        if found is None:
            return sum(depths) + 1
        stage, block = int(found[1]), int(found[3] or 0)
        if found[2] is None:
            stage = min(stage + 1, len(depths) - 1)
        elif found[2] == "post_norms":
            norms_after: Any = backbone.levels[stage].norms_after
            block = norms_after[block]
        return 1 + sum(depths[:stage]) + block

    def _require_names(self, model: nn.Module) -> None:
        names = [name for name, _ in model.named_parameters()]
        for first in self.first_layer:
            if not any(_is_in(name, first) for name in names):
                raise ValueError(
                    "first_layer must list parameters, or modules with parameters, of "
                    f"{type(model).__name__}, got {first!r}"
                )


def _is_in(parameter: str, name: str) -> bool:
    """Return whether a parameter has this name or belongs to a module of this name."""
    return f"{parameter}.".startswith(f"{name}.")
