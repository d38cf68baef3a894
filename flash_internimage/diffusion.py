"""Replace layers of the U-Nets of diffusers by DCNv4."""

from typing import Any, Literal

from torch import Tensor, nn

from ops_dcnv4 import DCNv4

from . import extras
from .dropin import factory_of, options_of, put_layers, replace

try:
    from diffusers import UNet2DConditionModel, UNet2DModel
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
except ModuleNotFoundError as error:
    if requirement := extras.describe(error):
        message = f"{__name__} requires {requirement}"
        raise ModuleNotFoundError(message, name=error.name) from error
    raise


class AttentionDCNv4(nn.Module):
    """DCNv4 in place of a self-attention of diffusers, images and tokens alike.

    Normalization, dropout, residual connection and scale are those of the attention.

    Args:
        attention: Attention to replace.
        **dcn: Arguments of :class:`~ops_dcnv4.DCNv4`.

    Attributes:
        grid_size: (H, W) of tokens (N, H * W, C), set by the hook of the transformer around them.
    """

    def __init__(self, attention: Attention, **dcn: Any) -> None:
        super().__init__()
        self.group_norm = attention.group_norm
        self.dcn = DCNv4(attention.query_dim, **dcn)
        self.dropout = attention.to_out[1]
        self.residual_connection = attention.residual_connection
        self.rescale_output_factor = attention.rescale_output_factor
        self.grid_size: tuple[int, int] | None = None

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Apply DCNv4 to an image (N, C, H, W), or to tokens (N, H * W, C) row by row.

        Further arguments are those of diffusers' attention processors; they have no effect.

        Raises:
            ValueError: If `encoder_hidden_states` or `attention_mask` is given, or the size of the
                image is not known.
        """
        if encoder_hidden_states is not None or attention_mask is not None:
            raise ValueError(
                "encoder_hidden_states and attention_mask must be None: DCNv4 has no attention"
            )
        image = hidden_states if hidden_states.ndim == 4 else self._to_image(hidden_states)
        if self.group_norm is not None:
            image = self.group_norm(image)
        output = self.dropout(self.dcn(image.permute(0, 2, 3, 1)))
        output = output.permute(0, 3, 1, 2) if hidden_states.ndim == 4 else output.flatten(1, 2)
        if self.residual_connection:
            output = output + hidden_states
        return output / self.rescale_output_factor

    def _to_image(self, tokens: Tensor) -> Tensor:
        if self.grid_size is None:
            raise ValueError("hidden_states must be (N, C, H, W) outside of a Transformer2DModel")
        return tokens.transpose(1, 2).unflatten(2, self.grid_size)


def replace_in_unet(
    unet: UNet2DModel | UNet2DConditionModel,
    layers: Literal["resnets", "attentions"] = "resnets",
    *,
    group_channels: int = 32,
    **dcn: Any,
) -> UNet2DModel | UNet2DConditionModel:
    """Replace layers of a U-Net by DCNv4, in place.

    The new layers are randomly initialized and average over their windows at first. The log lists
    the replaced layers. With the default arguments, the U-Net of Stable Diffusion 1 has as many
    parameters as that of the paper, 566 M.

    Args:
        unet: U-Net to change.
        layers: 'resnets' for the 3 x 3 convolutions of the ResNet blocks, replaced by
            :class:`~ops_dcnv4.DCNv4Conv2d`, or 'attentions' for self-attention, replaced by
            :class:`AttentionDCNv4`. Cross-attention, on a text for example, remains.
        group_channels: Channels per group of DCNv4. Layers whose channels it does not divide use
            the greatest common divisor.
        **dcn: Arguments of :class:`~ops_dcnv4.DCNv4` for 'attentions', such as `kernel_size`.

    Returns:
        The U-Net.

    Raises:
        TypeError: If `unet` is another model, or an argument of DCNv4 has the wrong type.
        ValueError: If `layers` is unknown, the U-Net has no such layers, or an argument is out of
            range.

    Example:
        >>> unet = replace_in_unet(UNet2DModel(block_out_channels=(32, 64, 64, 64)))
        >>> type(unet.mid_block.resnets[0].conv1).__name__
        'DCNv4Conv2d'
    """
    if not isinstance(unet, UNet2DModel | UNet2DConditionModel):
        raise TypeError(
            f"unet must be a UNet2DModel or UNet2DConditionModel, got {type(unet).__name__}"
        )
    if layers not in ("resnets", "attentions"):
        raise ValueError(f"layers must be 'resnets' or 'attentions', got {layers!r}")
    names = _convolutions(unet) if layers == "resnets" else _self_attentions(unet)
    if not names:
        raise ValueError(f"layers must be in the U-Net, got {layers!r}")
    if layers == "resnets":
        replace(unet, names, group_channels=group_channels, **dcn)
    else:
        put_layers(unet, {name: _replacement(unet, name, group_channels, dcn) for name in names})
        for module in unet.modules():
            if isinstance(module, Transformer2DModel):
                module.register_forward_pre_hook(_set_grid_size, with_kwargs=True)
    return unet


def _convolutions(unet: nn.Module) -> list[str]:
    blocks = ResnetBlock2D | ResnetBlockCondNorm2D
    names = [name for name, module in unet.named_modules() if isinstance(module, blocks)]
    names = [f"{name}.{convolution}" for name in names for convolution in ("conv1", "conv2")]
    return [name for name in names if isinstance(unet.get_submodule(name), nn.Conv2d)]


def _self_attentions(unet: nn.Module) -> list[str]:
    """Return the names of attention blocks of images, and of self-attention in transformers."""
    names = []
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and module.residual_connection:
            names.append(name)
        elif isinstance(module, Transformer2DModel):
            attentions = {
                f"{name}.transformer_blocks.{i}.attn1": block.attn1
                for i, block in enumerate(module.transformer_blocks)
            }
            names += [
                name
                for name, attention in attentions.items()
                if isinstance(attention, Attention) and not attention.is_cross_attention
            ]
    return names


def _replacement(
    unet: nn.Module, name: str, group_channels: int, dcn: dict[str, Any]
) -> AttentionDCNv4:
    attention = unet.get_submodule(name)
    if attention.spatial_norm is not None:
        raise ValueError(f"layers must have no spatial normalization, got {name}")
    options = options_of(attention.query_dim, group_channels, {"kernel_size": 3, **dcn})
    return AttentionDCNv4(attention, **options, **factory_of(attention))


def _set_grid_size(
    transformer: Transformer2DModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Tell the layers of a transformer the size of its image, a forward pre-hook."""
    image = args[0] if args else kwargs["hidden_states"]
    for block in transformer.transformer_blocks:
        if isinstance(block.attn1, AttentionDCNv4):
            block.attn1.grid_size = (image.shape[2], image.shape[3])
