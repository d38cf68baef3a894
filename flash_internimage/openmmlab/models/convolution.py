"""DCNv4 as an OpenMMLab convolution layer, for `conv_cfg` and `dcn` in configs."""

from mmengine.registry import MODELS

from ops_dcnv4 import DCNv4Conv2d


@MODELS.register_module()
class FlashDCNv4(DCNv4Conv2d):
    """DCNv4Conv2d with the arguments of mmcv's DCNv2.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias: See DCNv4Conv2d.
        groups: Must be 1, which mmcv's ConvModule passes.
        deform_groups: `offset_groups` of DCNv4Conv2d, under the name that it has in mmcv's DCNv2.

    Raises:
        ValueError: If `groups` is not 1, or if DCNv4Conv2d rejects an argument.

    Example::

        ConvModule(64, 64, 3, padding=1, conv_cfg=dict(type='FlashDCNv4', deform_groups=4))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        deform_groups: int | None = None,
        bias: bool = True,
    ) -> None:
        if groups != 1:
            raise ValueError(
                "groups must be 1, as every output channel of DCNv4 depends on every input "
                f"channel, got {groups}; deform_groups sets the groups of channels that share "
                "their offsets"
            )
        window = (kernel_size, stride, padding, dilation)
        super().__init__(in_channels, out_channels, *window, bias=bias, offset_groups=deform_groups)

    def init_weights(self) -> None:
        """Reset the parameters; mmengine calls this after the `init_cfg` of enclosing modules."""
        self.reset_parameters()
