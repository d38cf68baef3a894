"""Compare detectors with published weights to outputs of the published code."""

import copy

import pytest
import torch
from mmdet.models.dense_heads import DINOHead
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.structures import InstanceData
from torch import Tensor, nn

from flash_internimage.openmmlab import use_flash_attention
from flash_internimage.openmmlab.detection import ClampedReferenceDINOHead, HalfWidthEncodingDINO
from tests.flash_internimage.openmmlab.goldens import (
    arrays,
    assert_published,
    backbone_config,
    converted,
    published_config,
)


def rcnn_config(folder: str) -> dict:
    """Return the config of a published (Cascade) Mask R-CNN, with two modules renamed."""
    config = published_config(folder)
    config["backbone"] = backbone_config(config["backbone"])
    neck = config["neck"]
    assert (neck.pop("type"), neck.pop("norm_cfg")["type"]) == ("FPN_vitdet", "LN")
    assert neck.pop("use_residual")
    config["neck"] = {"type": "LayerNormFPN", **neck}
    heads = config["roi_head"]["bbox_head"]
    for head in heads if isinstance(heads, list) else [heads]:
        if head["type"] == "DCNv4FCBBoxHead":
            assert not head.pop("with_dcn")
            head["type"] = "ConvFCBBoxHead"
    return config


def dino_config() -> dict:
    """Return the config of the published DINO, with the transformer moved out of the head."""
    published = published_config("dino")
    head, transformer = published["bbox_head"], published["bbox_head"]["transformer"]
    encoder, decoder = transformer["encoder"], transformer["decoder"]
    deformable = {"embed_dims": 256, "num_levels": 4, "num_points": 4, "dropout": 0.0}

    def ffn(layers: dict) -> dict:
        channels = layers["transformerlayers"]["feedforward_channels"]
        return {"embed_dims": 256, "feedforward_channels": channels, "ffn_drop": 0.0}

    noise = head["dn_cfg"]["noise_scale"]
    return {
        "type": "HalfWidthEncodingDINO",
        "num_queries": head["num_query"],
        "num_feature_levels": 4,
        "with_box_refine": True,
        "as_two_stage": True,
        "backbone": backbone_config(published["backbone"]),
        "neck": published["neck"],
        "encoder": {
            "num_layers": encoder["num_layers"],
            "layer_cfg": {"self_attn_cfg": deformable, "ffn_cfg": ffn(encoder)},
        },
        "decoder": {
            "num_layers": decoder["num_layers"],
            "return_intermediate": True,
            "layer_cfg": {
                "self_attn_cfg": {"embed_dims": 256, "num_heads": 8, "dropout": 0.0},
                "cross_attn_cfg": deformable,
                "ffn_cfg": ffn(decoder),
            },
            "post_norm_cfg": None,
        },
        "positional_encoding": {
            "num_feats": 128,
            "temperature": 20,
            "normalize": True,
            "offset": 0.0,
        },
        "bbox_head": {
            "type": "ClampedReferenceDINOHead",
            **{key: head[key] for key in ("num_classes", "loss_cls", "loss_bbox", "loss_iou")},
        },
        "dn_cfg": {
            "label_noise_scale": noise["label"],
            "box_noise_scale": noise["box"],
            "group_cfg": head["dn_cfg"]["group_cfg"],
        },
        "test_cfg": published["test_cfg"],
    }


def load(folder: str, config: dict) -> nn.Module:
    model = MODELS.build(ConfigDict(config))
    weights = converted(folder)
    model.load_state_dict(weights, strict=True)
    return model.eval()


def sample(image: Tensor, img_shape: Tensor, rois: Tensor | None = None) -> DetDataSample:
    """Return the data sample of an image that is not resized, optionally with proposals."""
    height, width = img_shape[0].tolist()
    metainfo = {
        "img_shape": (height, width),
        "ori_shape": (height, width),
        "batch_input_shape": tuple(image.shape[-2:]),
        "scale_factor": (1.0, 1.0),
    }
    result = DetDataSample(metainfo=metainfo)
    if rois is not None:
        result.proposals = InstanceData(bboxes=rois[:, 1:])
    return result


def with_scores(found: InstanceData) -> Tensor:
    """Return boxes and scores as an array, (n, 5)."""
    return torch.cat((found.bboxes, found.scores[:, None]), 1)


def detections(model: nn.Module, image: Tensor, *description: Tensor) -> tuple[Tensor, Tensor]:
    """Return boxes with their scores, (n, 5), and labels."""
    [result] = model.predict(image, [sample(image, *description)], rescale=False)
    return with_scores(result.pred_instances), result.pred_instances.labels


def convolutional_outputs(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what (Cascade) Mask R-CNN computes before the box and mask heads."""
    image, img_shape, rois = inputs["img"], inputs["img_shape"], inputs["rois"]
    maps = model.backbone(image)
    pyramid = model.neck(maps)
    scores, deltas = model.rpn_head(pyramid)
    [found] = model.rpn_head.predict(pyramid, [sample(image, img_shape)], rescale=False)
    heads = model.roi_head
    cascaded = isinstance(heads.bbox_head, nn.ModuleList)
    extractors = heads.bbox_roi_extractor, heads.mask_roi_extractor
    bbox_extractor, mask_extractor = (e[0] if cascaded else e for e in extractors)
    return {
        **{f"backbone_{i}": tensor for i, tensor in enumerate(maps)},
        **{f"neck_{i}": tensor for i, tensor in enumerate(pyramid)},
        **{f"rpn_cls_{i}": tensor for i, tensor in enumerate(scores)},
        **{f"rpn_reg_{i}": tensor for i, tensor in enumerate(deltas)},
        "rpn_proposals_img0": with_scores(found),
        "roi_levels": bbox_extractor.map_roi_levels(rois, bbox_extractor.num_inputs),
        "roi_feats_bbox": bbox_extractor(pyramid[: bbox_extractor.num_inputs], rois),
        "roi_feats_mask": mask_extractor(pyramid[: mask_extractor.num_inputs], rois),
    }


@torch.no_grad()
def test_mask_rcnn():
    model, inputs = load("mask_rcnn", rcnn_config("mask_rcnn")), arrays("mask_rcnn/input")
    outputs = convolutional_outputs(model, inputs)
    heads = model.roi_head
    scores, deltas = heads.bbox_head(outputs["roi_feats_bbox"])
    outputs |= {"bbox_cls_score": scores, "bbox_pred": deltas}
    outputs["mask_logits"] = heads.mask_head(outputs["roi_feats_mask"])
    boxes, labels = detections(model, *(inputs[name] for name in ("img", "img_shape", "rois")))
    outputs |= {"det_bboxes_img0": boxes, "det_labels_img0": labels}
    assert_published(outputs, "mask_rcnn")


@torch.no_grad()
def test_cascade_mask_rcnn():
    model, inputs = load("cascade", rcnn_config("cascade")), arrays("cascade/input")
    outputs = convolutional_outputs(model, inputs)
    heads = model.roi_head
    for i in range(heads.num_stages):
        scores, deltas = heads.bbox_head[i](outputs["roi_feats_bbox"])
        masks = heads.mask_head[i](outputs["roi_feats_mask"])
        names = (f"stage{i}_cls_score", f"stage{i}_bbox_pred", f"stage{i}_mask_logits")
        outputs |= dict(zip(names, (scores, deltas, masks), strict=True))
    outputs |= refinement(model, inputs)
    boxes, labels = detections(model, *(inputs[name] for name in ("img", "img_shape", "rois")))
    by_class = labels.argsort(stable=True)
    outputs |= {"det_bboxes_img0": boxes[by_class], "det_labels_img0": labels[by_class]}
    assert_published(outputs, "cascade")


def refinement(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the regions that enter each stage of the cascade, and the outputs of its head."""
    heads, outputs = copy.deepcopy(model.roi_head), {}

    def record(i: int) -> None:
        def regions(module: nn.Module, args: tuple) -> None:
            outputs[f"chain_rois_{i}"] = args[1]

        def head(module: nn.Module, args: tuple, output: tuple[Tensor, Tensor]) -> None:
            outputs[f"chain_cls_score_{i}"], outputs[f"chain_bbox_pred_{i}"] = output

        heads.bbox_roi_extractor[i].register_forward_pre_hook(regions)
        heads.bbox_head[i].register_forward_hook(head)

    for i in range(heads.num_stages):
        record(i)
    image = inputs["img"]
    description = sample(image, inputs["img_shape"], inputs["rois"])
    heads.predict_bbox(
        model.extract_feat(image), [description.metainfo], [description.proposals], heads.test_cfg
    )
    return outputs


@pytest.mark.parametrize("flash", [False, True], ids=["stock attention", "flash attention"])
@torch.no_grad()
def test_dino(flash, monkeypatch):
    model, inputs = load("dino", dino_config()), arrays("dino/input")
    if flash:
        assert use_flash_attention(model) == 4
    maps = model.backbone(inputs["img"])
    pyramid = model.neck(maps)
    outputs = {f"backbone_{i}": tensor for i, tensor in enumerate(maps)}
    outputs |= {f"neck_{i}": tensor for i, tensor in enumerate(pyramid)}
    for prefix, image in (("nopad", "img"), ("pad", "img_pad")):
        image, img_shape = inputs[image], inputs[f"{prefix}_img_shape"]
        for name, tensor in dino_outputs(model, image, img_shape, monkeypatch).items():
            outputs[f"{prefix}_{name}"] = tensor
    assert_published(outputs, "dino")


def dino_outputs(
    model: nn.Module, image: Tensor, img_shape: Tensor, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Tensor]:
    topk, memory, scores, chosen = torch.topk, [], [], []

    def recorded(*args, **kwargs):
        chosen.append(topk(*args, **kwargs))
        return chosen[-1]

    hooks = [
        model.encoder.register_forward_hook(lambda module, args, output: memory.append(output)),
        model.bbox_head.cls_branches[-1].register_forward_hook(
            lambda module, args, output: scores.append(output)
        ),
    ]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "topk", recorded)
        decoded = model.forward_transformer(model.extract_feat(image), [sample(image, img_shape)])
    for hook in hooks:
        hook.remove()
    [memory], [scores], [(_, indices)] = memory, scores, chosen
    hidden, references = decoded["hidden_states"], decoded["references"]
    all_scores, all_boxes = model.bbox_head(hidden, references)
    boxes, labels = detections(model, image, img_shape)
    return {
        "enc_memory": memory,
        "enc_cls_all": scores,
        "topk_indices": indices,
        "topk_score": scores.take_along_dim(indices[..., None], 1),
        "topk_anchor": references[0],
        "dec_hidden": hidden,
        "dec_references": torch.stack(references),
        "all_cls_scores": all_scores,
        "all_bbox_preds": all_boxes,
        "det_bboxes_img0": boxes,
        "det_labels_img0": labels,
    }


def head_at_the_border(head: nn.Module) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return the published outputs for references from 0 to 1, and those of a head."""
    edge = arrays("dino/head_edge")
    with torch.no_grad():
        return edge, *head(edge["hidden_states"], list(edge["references"]))


def test_dino_head_at_the_border_of_the_image():
    model = load("dino", dino_config())
    assert type(model.bbox_head) is ClampedReferenceDINOHead
    edge, scores, boxes = head_at_the_border(model.bbox_head)
    torch.testing.assert_close(scores, edge["all_cls_scores"], rtol=0, atol=1e-5)
    torch.testing.assert_close(boxes, edge["all_bbox_preds"], rtol=0, atol=1e-6)


def test_stock_dino_head_differs_at_the_border_of_the_image():
    config = dino_config()
    config["bbox_head"]["type"] = "DINOHead"
    model = load("dino", config)
    assert type(model.bbox_head) is DINOHead
    edge, scores, boxes = head_at_the_border(model.bbox_head)
    torch.testing.assert_close(scores, edge["all_cls_scores"], rtol=0, atol=1e-5)
    assert (boxes - edge["all_bbox_preds"]).abs().max() > 1e-3


def test_stock_dino_cannot_load_published_weights():
    with pytest.raises(RuntimeError, match=r"size mismatch for decoder\.ref_point_head\.layers\.0"):
        load("dino", {**dino_config(), "type": "DINO"})


def test_queries_of_dino_are_initialized_as_published():
    torch.manual_seed(0)
    model = MODELS.build(ConfigDict(dino_config()))
    model.init_weights()
    assert model.query_embedding.weight.std().item() == pytest.approx(1, rel=0.1)  # mmdet: 0.085


@pytest.mark.parametrize("registry", [MODELS, ROOT_MODELS], ids=["mmdet", "root"])
def test_modules_of_dino_are_registered(registry):
    assert registry.get("HalfWidthEncodingDINO") is HalfWidthEncodingDINO
    assert registry.get("ClampedReferenceDINOHead") is ClampedReferenceDINOHead
