"""Compare segmentors with published weights to outputs of the published code."""

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS as ROOT_MODELS
from mmseg.models.decode_heads import Mask2FormerHead
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn
from torch.nn.functional import interpolate

from flash_internimage.openmmlab import use_flash_attention
from flash_internimage.openmmlab.segmentation import CombineFirstMask2FormerHead
from tests.flash_internimage.openmmlab.goldens import (
    arrays,
    assert_published,
    backbone_config,
    converted,
    published_config,
)

INPUT = (128, 160)
MASKS = (32, 40)


def upernet_config() -> dict:
    config = published_config("upernet")
    del config["pretrained"]
    return {**config, "backbone": backbone_config(config["backbone"])}


def mask2former_config() -> dict:
    """Return the config of the published Mask2Former in the format of today's mmseg."""
    config = published_config("mask2former")
    head = config["decode_head"]
    pixel_decoder, transformer = head["pixel_decoder"], head["transformer_decoder"]
    encoder = pixel_decoder["encoder"]
    layer, query_layer = encoder["transformerlayers"], transformer["transformerlayers"]
    assert layer["operation_order"] == ["self_attn", "norm", "ffn", "norm"]
    order = ["cross_attn", "norm", "self_attn", "norm", "ffn", "norm"]
    assert query_layer["operation_order"] == order
    assert head["num_things_classes"] + head["num_stuff_classes"] == head["num_classes"]
    attention = {"embed_dims": 64, "num_heads": 8, "dropout": 0.0, "batch_first": True}
    sizes = ("embed_dims", "num_heads", "num_levels", "num_points", "dropout")
    kept = ("in_channels", "feat_channels", "out_channels", "num_classes", "num_queries")
    kept += ("num_transformer_feat_level", "enforce_decoder_input_project")
    return {
        "type": "EncoderDecoder",
        "backbone": backbone_config(config["backbone"]),
        "decode_head": {
            "type": "CombineFirstMask2FormerHead",
            **{key: head[key] for key in kept},
            "strides": [4, 8, 16, 32],
            "pixel_decoder": {
                "type": "mmdet.MSDeformAttnPixelDecoder",
                **{key: pixel_decoder[key] for key in ("num_outs", "norm_cfg", "act_cfg")},
                "encoder": {
                    "num_layers": encoder["num_layers"],
                    "layer_cfg": {
                        "self_attn_cfg": {
                            **{key: layer["attn_cfgs"][key] for key in sizes},
                            "batch_first": True,
                        },
                        "ffn_cfg": ffn(layer),
                    },
                },
                "positional_encoding": positional_encoding(pixel_decoder),
            },
            "positional_encoding": positional_encoding(head),
            "transformer_decoder": {
                "return_intermediate": True,
                "num_layers": transformer["num_layers"],
                "layer_cfg": {
                    "self_attn_cfg": attention,
                    "cross_attn_cfg": attention,
                    "ffn_cfg": ffn(query_layer),
                },
            },
            **{
                loss: {**head[loss], "type": f"mmdet.{head[loss]['type']}"}
                for loss in ("loss_cls", "loss_mask", "loss_dice")
            },
        },
        "test_cfg": {"mode": config["test_cfg"]["mode"]},
    }


def ffn(layer: dict) -> dict:
    kept = ("embed_dims", "feedforward_channels", "num_fcs", "act_cfg", "ffn_drop")
    return {key: layer["ffn_cfgs"][key] for key in kept}


def positional_encoding(part: dict) -> dict:
    return {key: part["positional_encoding"][key] for key in ("num_feats", "normalize")}


def load(folder: str, config: dict, weights: dict[str, Tensor] | None = None) -> nn.Module:
    model = MODELS.build(ConfigDict(config))
    weights = weights or converted(folder)
    model.load_state_dict(weights, strict=True)
    return model.eval()


def mask2former(**options) -> nn.Module:
    """Load the golden Mask2Former with options of the head."""
    config = mask2former_config()
    config["decode_head"] |= options
    return load("mask2former", config)


def scores_of(model: nn.Module, folder: str, ori_shape: tuple[int, int] = INPUT) -> Tensor:
    """Return the scores of the golden image, (1, classes, H, W), at its original size."""
    sample = SegDataSample(metainfo={"ori_shape": ori_shape, "img_shape": INPUT})
    [result] = model.predict(arrays(f"{folder}/input")["img"], [sample])
    scores = result.seg_logits.data
    assert torch.equal(result.pred_sem_seg.data, scores.argmax(0, keepdim=True))
    return scores[None]


def prediction(model: nn.Module, folder: str) -> dict[str, Tensor]:
    scores = scores_of(model, folder)
    first, second = scores.topk(2, dim=1).values.unbind(1)
    return {
        "seg_logits_stride4": scores[:, :, ::4, ::4],
        "seg_argmax": scores.argmax(1).to(torch.uint8),
        "seg_margin_top2": first - second,
    }


@torch.no_grad()
def test_upernet():
    model = load("upernet", upernet_config())
    maps = model.backbone(arrays("upernet/input")["img"])
    outputs = {f"backbone_{i}": tensor for i, tensor in enumerate(maps)}
    outputs |= {"decode_logits": model.decode_head(maps), "aux_logits": model.auxiliary_head(maps)}
    assert_published(outputs | prediction(model, "upernet"), "upernet")


@pytest.mark.parametrize("flash", [False, True], ids=["stock attention", "flash attention"])
@torch.no_grad()
def test_mask2former(flash):
    model = mask2former()
    head = model.decode_head
    if flash:
        assert use_flash_attention(model) == 2
    maps = model.backbone(arrays("mask2former/input")["img"])
    mask_features, levels = head.pixel_decoder(maps)
    classes, masks = head(maps, [SegDataSample()])
    outputs = {
        **{f"backbone_{i}": tensor for i, tensor in enumerate(maps)},
        **{f"pixel_multi_scale_{i}": tensor for i, tensor in enumerate(levels)},
        **{f"mask_preds_l{i}_mean": masks[i].mean((2, 3)) for i in (1, 2, 3)},
        "pixel_mask_features": mask_features,
        "cls_preds": torch.stack(list(classes)),
        "mask_preds_first": masks[0],
        "mask_preds_last": masks[-1],
        "seg_scores_before_resize": head.predict(maps, [{"img_shape": MASKS}], model.test_cfg),
    }
    assert_published(outputs | prediction(model, "mask2former"), "mask2former")


@pytest.mark.parametrize(
    ("folder", "before_resizing"),
    [("upernet", "decode_logits"), ("mask2former", "seg_scores_before_resize")],
)
@torch.no_grad()
def test_scores_are_resized_to_the_input_and_then_to_the_original_image(folder, before_resizing):
    model = mask2former() if folder == "mask2former" else load("upernet", upernet_config())
    expected = arrays(f"{folder}/outputs")[before_resizing]
    for size in (INPUT, (75, 131)):
        expected = interpolate(expected, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(scores_of(model, folder, (75, 131)), expected, rtol=0, atol=5e-4)


@torch.no_grad()
def test_padding_counts_as_part_of_the_input():
    """Padding is removed after resizing, as with the heads of mmseg."""
    model, image = mask2former(), arrays("mask2former/input")["img"]
    metainfo = {"ori_shape": (96, 128), "img_shape": (96, 128), "pad_shape": INPUT}
    whole = model.encode_decode(image, [{"img_shape": INPUT}])
    assert torch.equal(model.encode_decode(image, [metainfo]), whole)
    sample = SegDataSample(metainfo={**metainfo, "padding_size": (0, 32, 0, 32)})
    [result] = model.predict(image, [sample])
    assert torch.equal(result.seg_logits.data, whole[0, :, :96, :128])


@pytest.mark.parametrize("combine_first", [True, False], ids=["published", "mmseg"])
@pytest.mark.parametrize(
    ("crop", "stride"),
    [((64, 64), (48, 48)), ((96, 64), (40, 64)), ((192, 64), (192, 64)), (INPUT, INPUT)],
    ids=["square", "oblong", "higher than the image", "one window"],
)
@torch.no_grad()
def test_windows_are_segmented_like_images_of_their_size(crop, stride, combine_first):
    model, image = mask2former(combine_first=combine_first), arrays("mask2former/input")["img"]
    image = torch.cat([image, image.flip(3)])
    (height, width), count = INPUT, torch.zeros(INPUT)
    total = torch.zeros(2, model.num_classes, *INPUT)
    for bottom in {min(y + crop[0], height) for y in range(0, height, stride[0])}:
        for right in {min(x + crop[1], width) for x in range(0, width, stride[1])}:
            part = np.s_[max(bottom - crop[0], 0) : bottom, max(right - crop[1], 0) : right]
            window = image[:, :, *part]
            size = tuple(window.shape[2:])
            total[:, :, *part] += model.encode_decode(window, [{"img_shape": size}] * 2)
            count[part] += 1
    model.test_cfg = ConfigDict(mode="slide", crop_size=crop, stride=stride)
    metas = [{"ori_shape": INPUT, "img_shape": (96, 128), "pad_shape": INPUT} for _ in range(2)]
    found = model.inference(image, metas)
    torch.testing.assert_close(found, total / count, rtol=0, atol=1e-5)


def test_the_order_of_mmseg_is_optional_and_gives_other_results():
    stock = mask2former(combine_first=False)
    own = mask2former(type="Mask2FormerHead")
    assert type(stock.decode_head) is CombineFirstMask2FormerHead
    assert type(own.decode_head) is Mask2FormerHead
    with torch.no_grad():
        scores = scores_of(stock, "mask2former")
        assert torch.equal(scores, scores_of(own, "mask2former"))
    published = arrays("mask2former/outputs")["seg_argmax"]
    assert 0.14 < (scores.argmax(1) != published).float().mean() < 0.18


@pytest.mark.parametrize(
    "swapped", [("self_attn", "cross_attn"), ("query_embed", "query_feat")], ids=" ".join
)
@torch.no_grad()
def test_swapped_weights_change_the_scores(swapped):
    """Swapped weights of equal shapes load without an error."""
    one, other = swapped

    def swap(name: str) -> str:
        if not name.startswith("decode_head.") or "pixel_decoder" in name:
            return name
        return name.replace(*swapped) if one in name else name.replace(other, one)

    weights = converted("mask2former")
    model = load("mask2former", mask2former_config(), {swap(k): v for k, v in weights.items()})
    classes, _ = model.decode_head(
        model.backbone(arrays("mask2former/input")["img"]), [SegDataSample()]
    )
    assert (classes[-1] - arrays("mask2former/outputs")["cls_preds"][-1]).abs().max() > 1


@pytest.mark.parametrize("registry", [MODELS, ROOT_MODELS], ids=["mmseg", "root"])
def test_the_head_of_mask2former_is_registered(registry):
    assert registry.get("CombineFirstMask2FormerHead") is CombineFirstMask2FormerHead
