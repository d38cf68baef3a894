"""Test DCNv4 as a convolution in configs of OpenMMLab."""

import copy

import pytest
import torch
from mmcv.cnn import ConvModule
from mmcv.cnn.utils import fuse_conv_bn
from mmdet.models import ResNet
from mmengine.analysis import ActivationAnalyzer, FlopAnalyzer
from mmengine.model import ModuleList
from mmengine.registry import MODELS

from flash_internimage.openmmlab import FlashDCNv4
from ops_dcnv4 import DCNv4Conv2d, flops


def conv_module(**options) -> ConvModule:
    arguments = {"conv_cfg": {"type": "FlashDCNv4"}, "norm_cfg": {"type": "BN"}} | options
    return ConvModule(32, 48, 3, stride=2, padding=1, **arguments)


@pytest.mark.parametrize(
    "options", [{}, {"padding_mode": "reflect"}, {"dilation": 2}, {"bias": True}]
)
@pytest.mark.filterwarnings("ignore:Unnecessary conv bias")
def test_conv_module_has_the_same_attributes_as_with_nn_conv2d(options):
    module, plain = conv_module(**options), conv_module(**options, conv_cfg=None)
    assert type(module.conv) is FlashDCNv4
    names = "in_channels out_channels kernel_size stride padding dilation transposed output_padding"
    for name in names.split():
        assert getattr(module, name) == getattr(plain, name), name
    for name in ("padding", "padding_mode", "transposed", "output_padding", "groups"):
        assert getattr(module.conv, name) == getattr(plain.conv, name), name
    assert (module.conv.bias is None) == (plain.conv.bias is None)
    x = torch.randn(2, 32, 9, 8)
    assert module(x).shape == plain(x).shape


def test_offset_groups_are_set_in_the_config():
    assert conv_module().conv.offset_groups == 2
    assert conv_module(conv_cfg={"type": "FlashDCNv4", "deform_groups": 8}).conv.offset_groups == 8
    with pytest.raises(ValueError, match="groups must be 1, as every output channel"):
        conv_module(groups=4)


def test_conv_cfg_accepts_the_class_of_ops_dcnv4():
    assert conv_module(conv_cfg={"type": DCNv4Conv2d}).conv.offset_groups == 2
    module = conv_module(conv_cfg={"type": DCNv4Conv2d, "offset_groups": 4})
    assert (module.groups, module.conv.groups, module.conv.offset_groups) == (1, 1, 4)
    assert module(torch.randn(2, 32, 9, 8)).shape == (2, 48, 5, 4)


def test_fusing_batch_norms_keeps_the_output():
    module = conv_module().eval()
    torch.nn.init.normal_(module.bn.running_mean)
    x = torch.randn(2, 32, 9, 8)
    fused = fuse_conv_bn(copy.deepcopy(module))
    torch.testing.assert_close(fused(x), module(x), rtol=0, atol=0)


def test_mmengine_counts_multiply_adds_and_activations_with_the_handles():
    module, x = conv_module(norm_cfg=None), torch.rand(1, 32, 9, 8)
    analyzer = FlopAnalyzer(module, x).set_op_handle(**flops.HANDLES)
    pixels, pixels_out, offset_channels = 9 * 8, 5 * 4, 56
    projections = pixels * 32 * 32 + pixels_out * 32 * (48 + offset_channels)
    assert analyzer.total() == projections + 5 * pixels_out * 9 * 32
    activations = ActivationAnalyzer(module, x).set_op_handle(**flops.ACTIVATION_HANDLES)
    outputs = pixels * 32 + pixels_out * (offset_channels + 32 + 48)
    assert activations.total() == outputs


def test_init_cfg_of_linear_layers_keeps_offsets_at_zero():
    layers = ModuleList(
        [
            MODELS.build(
                {"type": "FlashDCNv4", "in_channels": 16, "out_channels": 8, "kernel_size": 3}
            )
        ],
        init_cfg={"type": "Normal", "layer": "Linear"},
    )
    layers.init_weights()
    assert not layers[0].offset_mask.weight.any()


def test_resnet_of_mmdet_accepts_it_as_dcn():
    resnet = ResNet(
        50, base_channels=16, dcn={"type": "FlashDCNv4"}, stage_with_dcn=(False, False, False, True)
    )
    found = [m for m in resnet.modules() if isinstance(m, FlashDCNv4)]
    assert [m.offset_groups for m in found] == [8] * 3
    features = resnet(torch.randn(1, 3, 64, 64))
    assert features[-1].shape == (1, 512, 2, 2)
