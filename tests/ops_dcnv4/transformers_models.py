"""Small models of Hugging Face transformers with random weights, built without downloads."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DFineConfig,
    DFineForObjectDetection,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    OneFormerConfig,
    OneFormerForUniversalSegmentation,
    ResNetConfig,
    RTDetrConfig,
    RTDetrForObjectDetection,
    RTDetrResNetConfig,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
    SwinConfig,
)

STAGES = ["stage1", "stage2", "stage3", "stage4"]
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]}
SWIN = {"image_size": 64, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
DETECTOR = {
    "d_model": 32, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_layers": 1,
    "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "num_queries": 5,
}  # fmt: skip
RT_DETECTOR = DETECTOR | {
    "encoder_hidden_dim": 32, "encoder_in_channels": [16] * 3, "decoder_in_channels": [32] * 3,
    "num_denoising": 0,
}  # fmt: skip
SEGMENTOR = {
    "hidden_dim": 32, "encoder_feedforward_dim": 16, "dim_feedforward": 16, "encoder_layers": 1,
    "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 5,
}  # fmt: skip


def resnet(cls: type = ResNetConfig):
    return cls(**RESNET, layer_type="basic", out_features=STAGES[1:])


def swin(stages: list[str] = STAGES):
    return SwinConfig(**SWIN, window_size=4, out_features=stages)


def deformable_detr() -> nn.Module:
    config = DeformableDetrConfig(backbone_config=resnet(), use_timm_backbone=False, **DETECTOR)
    return DeformableDetrForObjectDetection(config)


def grounding_dino() -> nn.Module:
    text = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        vocab_size=1100,
    )  # fmt: skip
    return GroundingDinoForObjectDetection(
        GroundingDinoConfig(
            backbone_config=swin(STAGES[1:]), text_config=text, max_text_len=8, **DETECTOR
        )
    )


def rt_detr() -> nn.Module:
    return RTDetrForObjectDetection(
        RTDetrConfig(backbone_config=resnet(RTDetrResNetConfig), **RT_DETECTOR)
    )


def rt_detr_v2(**options) -> nn.Module:
    config = RTDetrV2Config(backbone_config=resnet(RTDetrResNetConfig), **RT_DETECTOR, **options)
    return RTDetrV2ForObjectDetection(config)


def d_fine(points: int | list[int] = 2, **options) -> nn.Module:
    return DFineForObjectDetection(
        DFineConfig(
            backbone_config=resnet(RTDetrResNetConfig), decoder_n_points=points,
            **RT_DETECTOR, **options,
        )
    )  # fmt: skip


def mask2former() -> nn.Module:
    config = Mask2FormerConfig(
        backbone_config=swin(), feature_size=32, mask_feature_size=32, **SEGMENTOR
    )
    return Mask2FormerForUniversalSegmentation(config)


def oneformer() -> nn.Module:
    config = OneFormerConfig(
        backbone_config=swin(), conv_dim=32, mask_dim=32, is_training=False, text_encoder_width=32,
        text_encoder_num_layers=1, text_encoder_vocab_size=100, text_encoder_context_length=7,
        task_seq_len=7, **SEGMENTOR,
    )  # fmt: skip
    return OneFormerForUniversalSegmentation(config)


# Each model with the number of its layers that compute deformable attention.
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "deformable_detr": (deformable_detr, 3),
    "grounding_dino": (grounding_dino, 3),
    "rt_detr": (rt_detr, 2),
    "rt_detr_v2": (rt_detr_v2, 2),
    "d_fine": (d_fine, 2),
    "d_fine_points_per_level": (lambda: d_fine([2, 4, 3]), 2),
    "mask2former": (mask2former, 1),
    "oneformer": (oneformer, 1),
}


def build(name: str) -> nn.Module:
    """Build a model whose outputs depend on the attention, with points off the pixel centers.

    Bilinear sampling has no derivative at pixel centers, where the initial points of the encoders
    are.
    """
    model = MODELS[name][0]().eval()
    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            layer.reset_parameters()
    for parameter, tensor in model.named_parameters():
        if "sampling_offsets.bias" in parameter:
            nn.init.uniform_(tensor, -2, 2)
    return model


def random_inputs(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs = {"pixel_values": torch.rand(2, 3, 64, 96, dtype=dtype)}
    if name == "grounding_dino":
        inputs["input_ids"] = torch.tensor([[101, 5, 6, 1012, 102]] * 2)
    if name == "oneformer":
        inputs["task_inputs"] = torch.randint(0, 100, (2, 7))
    return inputs
