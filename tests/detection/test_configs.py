"""Compare the configs and their detectors with the published recipes."""

import copy
import functools
import json
import re
from collections.abc import Iterator
from math import exp
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import cv2
import mmengine.config.utils
import numpy as np
import pytest
import torch
from mmdet.datasets import CocoDataset
from mmdet.engine.hooks import NumClassCheckHook
from mmdet.registry import DATASETS, HOOKS, MODELS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from torch import nn

from flash_internimage.openmmlab.cli import config as program
from flash_internimage.openmmlab.cli.train import training_parser
from tests import recipes
from tests.recipes import DATA, ROOT, an_eighth, plain, read_recipes, without

RECIPES = read_recipes("detection_recipes.csv")
FOLDERS = {"mask_rcnn": "mask_rcnn", "cascade_mask_rcnn": "cascade", "dino-4scale": "dino"}

# Transforms of the published training and testing, under the names of mmengine.
LOAD = [{"type": "LoadReadableImage"}]
ANNOTATIONS = {
    True: {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
    False: {"type": "LoadAnnotations", "with_bbox": True},
}
FLIP = {"type": "RandomFlip", "prob": 0.5}
PACK = {"type": "PackDetInputs"}
TO_TEST_SIZE = {"type": "Resize", "scale": [1333, 800], "keep_ratio": True}


def resize_to_one_of(short_sides: list[int], long_side: int) -> dict:
    scales = [[short, long_side] for short in short_sides]
    return {"type": "RandomChoiceResize", "scales": scales, "keep_ratio": True}


TO_SEVERAL_SIZES = resize_to_one_of(
    [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800], long_side=1333
)


def crop_half_of_the_images(long_side: int, allow_negative_crop: bool) -> dict:
    crop = {
        "type": "RandomCrop",
        "crop_type": "absolute_range",
        "crop_size": [384, 600],
        "allow_negative_crop": allow_negative_crop,
    }
    cropped = [resize_to_one_of([400, 500, 600], long_side), crop, TO_SEVERAL_SIZES]
    return {"type": "RandomChoice", "transforms": [[TO_SEVERAL_SIZES], cropped]}


AUGMENTATIONS = {
    "A": [*LOAD, ANNOTATIONS[True], TO_TEST_SIZE, FLIP, PACK],
    "B": [*LOAD, ANNOTATIONS[True], FLIP, crop_half_of_the_images(1333, True), PACK],
    "C": [*LOAD, ANNOTATIONS[False], FLIP, crop_half_of_the_images(4200, False), PACK],
}


@pytest.fixture(autouse=True)
def mmdet_scope() -> Iterator[None]:
    """Build models and data in the scope that a runner sets."""
    with DefaultScope.overwrite_default_scope("mmdet"):
        yield


load_config = functools.partial(recipes.load_config, "detection")
build_model = functools.partial(recipes.build_model, "detection")


@pytest.fixture(scope="module", autouse=True)
def metafiles_are_read_once() -> Iterator[None]:
    """Cache files: mmengine reads a hundred metafiles for each base config of mmdet."""
    cached = functools.cache(mmengine.config.utils.load)
    with mock.patch("mmengine.config.utils.load", cached):
        yield


@pytest.fixture(params=RECIPES)
def recipe(request) -> dict[str, str]:
    return RECIPES[request.param]


@pytest.fixture
def config(recipe) -> Config:
    return load_config(recipe["config"])


@pytest.fixture
def model(recipe) -> nn.Module:
    return build_model(recipe["config"])


def family(recipe: dict[str, str]) -> str:
    return re.split(r"_(?:flash_)?internimage_", recipe["config"])[0]


def published(recipe: dict[str, str]) -> dict:
    """Return the published config of a small model of the same family."""
    path = DATA / "openmmlab" / FOLDERS[family(recipe)] / "config.json"
    return json.loads(path.read_text())["model"]


def test_every_config_has_a_recipe():
    files = (ROOT / "configs" / "detection").glob("*_coco.py")
    assert {file.stem for file in files} == set(RECIPES)


def test_config_in_the_guide_for_own_data(tmp_path):
    guide = (ROOT / "docs" / "own-data.md").read_text().partition("## Detection\n")[2]
    code = guide.split("```python\n")[1].split("```")[0]
    path = tmp_path / "parts.py"
    path.write_text(code)
    config = program.config_of(training_parser("train", "").parse_args([str(path)]))
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        assert loader.dataset.data_root == "data/parts/"
        assert loader.dataset.data_prefix == {"img": "images/"}
        assert loader.dataset.metainfo.classes == ("bolt", "nut")
    assert config.train_dataloader.dataset.ann_file == "train.json"
    assert config.test_dataloader.dataset.ann_file == "val.json"
    assert config.val_evaluator.ann_file == "data/parts/val.json"
    assert config.test_evaluator.ann_file == "data/parts/val.json"
    heads = config.model.roi_head
    assert (heads.bbox_head.num_classes, heads.mask_head.num_classes) == (2, 2)
    released = RECIPES["mask_rcnn_flash_internimage_t_fpn_1x_coco"]["checkpoint"]
    assert Path(config.load_from).name == released


def test_optimizer(recipe, config):
    expected = {
        "type": "OptimWrapper",
        "constructor": "InternImageLayerDecayOptimizerConstructor",
        "optimizer": {
            "type": "AdamW",
            "lr": float(recipe["lr"]),
            "weight_decay": float(recipe["weight_decay"]),
        },
    }
    if recipe["layer_decay_rate"]:
        expected["paramwise_cfg"] = {
            "layer_decay_rate": float(recipe["layer_decay_rate"]),
            "offset_lr_scale": float(recipe["offset_lr_scale"]),
        }
    else:
        expected["constructor"] = "DefaultOptimWrapperConstructor"
        expected["paramwise_cfg"] = {"custom_keys": {"backbone": {"lr_mult": 0.1}}}
    if recipe["clip_norm"]:
        expected["clip_grad"] = {"max_norm": float(recipe["clip_norm"]), "norm_type": 2}
    assert plain(config.optim_wrapper) == expected


def learning_rates(config: Config, model: nn.Module) -> dict[str, float]:
    optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.999)}
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    return {name: rates[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", [name for name in RECIPES if RECIPES[name]["layer_decay_rate"]])
def test_learning_rates_decrease_from_the_neck_to_the_stem(name):
    recipe = RECIPES[name]
    lr, rate = float(recipe["lr"]), float(recipe["layer_decay_rate"])
    deepest = f"backbone.levels.3.blocks.{4 if int(recipe['layers']) > 33 else 3}."
    rates = learning_rates(load_config(name), build_model(name))
    neck = [rates[name] for name in rates if name.startswith("neck.")]
    assert neck == pytest.approx([lr] * len(neck))
    assert rates[deepest + "mlp.fc1.weight"] == pytest.approx(lr * rate)
    is_flash = "_flash_" in name
    predicts = deepest + ("dcn.offset_mask.weight" if is_flash else "dcn.offset.weight")
    assert rates[predicts] == pytest.approx(lr * rate * float(recipe["offset_lr_scale"]))
    stem = lr * rate ** (int(recipe["layers"]) + 1)
    assert rates["backbone.patch_embed.conv1.weight"] == pytest.approx(stem)


@pytest.mark.parametrize(
    "name",
    [
        "dino-4scale_flash_internimage_l_1x_coco",
        "dino-4scale_internimage_l_small_backbone_lr_1x_coco",
    ],
)
def test_large_dino_uses_a_tenth_of_the_rate_in_its_backbone_and_decays_all_weights(name):
    model = build_model(name)
    optimizer = build_optim_wrapper(model, load_config(name).optim_wrapper).optimizer
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.05}
    for parameter, rate in learning_rates(load_config(name), model).items():
        assert rate == pytest.approx(1e-5 if parameter.startswith("backbone.") else 1e-4), parameter


def test_schedule(recipe, config):
    epochs = int(recipe["epochs"])
    warm_up = {"type": "LinearLR", "start_factor": 0.001, "begin": 0, "end": 500}
    steps = {"type": "MultiStepLR", "gamma": 0.1, "begin": 0, "end": epochs}
    milestones = [int(epoch) for epoch in recipe["steps"].split()]
    assert plain(config.param_scheduler) == [
        {**warm_up, "by_epoch": False},
        {**steps, "by_epoch": True, "milestones": milestones},
    ]
    assert plain(config.train_cfg) == {
        "type": "EpochBasedTrainLoop",
        "max_epochs": epochs,
        "val_interval": 1,
    }


def test_images_per_update(recipe, config):
    images, total = int(recipe["images_per_gpu"]), int(recipe["images_per_update"])
    assert config.train_dataloader.batch_size == images
    assert plain(config.auto_scale_lr) == {"enable": False, "base_batch_size": total}
    first_line = Path(config.filename).read_text().splitlines()[0]
    assert first_line == f"# {total // images} GPUs x {images} images"


def test_training_data(recipe, config):
    loader = plain(config.train_dataloader)
    pipeline = loader["dataset"].pop("pipeline")
    assert pipeline == AUGMENTATIONS[recipe["augmentation"]]
    assert loader == {
        "batch_size": int(recipe["images_per_gpu"]),
        "num_workers": 2,
        "persistent_workers": True,
        "sampler": {"type": "DefaultSampler", "shuffle": True},
        "batch_sampler": {"type": "AspectRatioBatchSampler"},
        "dataset": {
            "type": "CheckedCocoDataset",
            "data_root": "data/coco/",
            "ann_file": "annotations/instances_train2017.json",
            "data_prefix": {"img": "train2017/"},
            "filter_cfg": {"filter_empty_gt": True, "min_size": 32},
            "backend_args": None,
        },
    }


def test_test_data(recipe, config):
    masks = bool(recipe["mask_ap"])
    kept = ["img_id", "img_path", "ori_shape", "img_shape", "scale_factor"]
    assert plain(config.test_dataloader) == {
        "batch_size": 1,
        "num_workers": 2,
        "persistent_workers": True,
        "drop_last": False,
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "dataset": {
            "type": "CheckedCocoDataset",
            "data_root": "data/coco/",
            "ann_file": "annotations/instances_val2017.json",
            "data_prefix": {"img": "val2017/"},
            "test_mode": True,
            "backend_args": None,
            "pipeline": [
                {"type": "LoadImageFromFile", "backend_args": None},
                TO_TEST_SIZE,
                ANNOTATIONS[masks],
                {**PACK, "meta_keys": kept},
            ],
        },
    }
    evaluator = plain(config.test_evaluator)
    assert evaluator["type"] == "CheckedCocoMetric"
    assert evaluator["metric"] == (["bbox", "segm"] if masks else "bbox")
    assert evaluator["ann_file"] == "data/coco/annotations/instances_val2017.json"
    assert config.val_dataloader == config.test_dataloader
    assert config.val_evaluator == config.test_evaluator


def test_images_are_normalized_and_padded_to_multiples_of_32(config):
    preprocessor = MODELS.build(config.model.data_preprocessor)
    assert preprocessor.mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    assert preprocessor.std.flatten().tolist() == pytest.approx([58.395, 57.12, 57.375])
    assert preprocessor._channel_conversion
    assert preprocessor.pad_size_divisor == 32


def test_hooks(recipe, config):
    names = "CheckDetectorHook", "NumClassCheckHook", "CheckFiniteHook", "CurvesHook"
    hooks = [{"type": name} for name in names]
    if recipe["ema"] == "yes":
        average = {"ema_type": "ExpMomentumEMA", "momentum": 1e-4, "gamma": 2000}
        hooks.append({"type": "EMAHook", **average, "update_buffers": True})
    if family(recipe) == "dino-4scale":
        hooks.append({"type": "FlashAttentionHook"})
    assert plain(config.custom_hooks) == hooks
    assert plain(config.default_hooks.checkpoint) == {
        "type": "AtomicCheckpointHook",
        "interval": 1,
        "max_keep_ckpts": 1,
        "save_best": "auto",
        "save_last": True,
    }


def test_number_of_classes_matches_the_data(model):
    dataset = SimpleNamespace(metainfo=CocoDataset.METAINFO)
    loader = SimpleNamespace(dataset=dataset)
    NumClassCheckHook().before_train_epoch(SimpleNamespace(model=model, train_dataloader=loader))


def test_backbone(recipe, model):
    recipes.assert_published_backbone(model.backbone, recipe)
    assert model.backbone.out_indices == (
        (1, 2, 3) if family(recipe) == "dino-4scale" else (0, 1, 2, 3)
    )


def test_parameters(recipe, model):
    recipes.assert_published_parameters(model, recipe)


@pytest.fixture(params=[name for name in RECIPES if "mask_rcnn" in name])
def rcnn(request) -> dict[str, str]:
    return RECIPES[request.param]


def test_rcnn_heads_and_their_training_equal_the_published_ones(rcnn):
    config, expected = plain(load_config(rcnn["config"]).model), published(rcnn)
    for head in expected["roi_head"]["bbox_head"] if family(rcnn) == "cascade_mask_rcnn" else ():
        assert (head["type"], head.pop("with_dcn")) == ("DCNv4FCBBoxHead", False)
        head["type"] = "ConvFCBBoxHead"
    widths = {"in_channels", "feat_channels", "out_channels", "conv_out_channels"}
    widths |= {"fc_out_channels", "num_classes"}
    for part in ("rpn_head", "roi_head", "train_cfg"):
        assert without(config[part], widths) == without(expected[part], widths)


def test_neck_of_rcnn(rcnn):
    stages = build_model(rcnn["config"]).backbone.feature_info
    assert plain(load_config(rcnn["config"]).model.neck) == {
        "type": "LayerNormFPN" if "_flash_" in rcnn["config"] else "FPN",
        "in_channels": [stage["num_chs"] for stage in stages],
        "out_channels": 256,
        "num_outs": 5,
    }


def test_rcnn_proposals_and_suppression(rcnn):
    config = plain(load_config(rcnn["config"]).model)
    assert config["test_cfg"] == {
        "rpn": {
            "nms_pre": 1000,
            "nms": {"type": "nms", "iou_threshold": 0.7},
            "max_per_img": 1000,
            "min_bbox_size": 0,
        },
        "rcnn": {
            "score_thr": 0.05,
            "nms": {"type": "nms", "iou_threshold": 0.5},
            "max_per_img": 100,
            "mask_thr_binary": 0.5,
        },
    }
    of_training = 2000 if family(rcnn) == "cascade_mask_rcnn" else 1000
    assert config["train_cfg"]["rpn_proposal"]["max_per_img"] == of_training


DINO = [name for name in RECIPES if name.startswith("dino")]


@pytest.fixture(params=DINO)
def dino(request) -> nn.Module:
    return build_model(request.param)


def test_dino_losses_and_matching_equal_the_published_ones(dino):
    expected = published(RECIPES["dino-4scale_flash_internimage_t_1x_coco"])
    config = plain(load_config("dino-4scale_flash_internimage_t_1x_coco").model)
    head = expected["bbox_head"]
    for loss in ("loss_cls", "loss_bbox", "loss_iou"):
        assert config["bbox_head"][loss] == head[loss]
    assert dino.bbox_head.sync_cls_avg_factor
    costs = [expected["train_cfg"]["assigner"][f"{kind}_cost"] for kind in ("cls", "reg", "iou")]
    assert config["train_cfg"]["assigner"]["match_costs"] == costs
    assert type(dino.bbox_head).__name__ == "ClampedReferenceDINOHead"


def test_dino_queries(dino):
    assert dino.num_queries == 900
    assert dino.as_two_stage
    assert dino.with_box_refine
    generator = dino.dn_query_generator
    assert (generator.label_noise_scale, generator.box_noise_scale) == (0.5, 1.0)
    assert generator.dynamic_dn_groups
    assert generator.num_dn_queries == 100
    assert generator.num_classes == 80


@pytest.mark.parametrize("name", DINO)
def test_dino_returns_the_published_number_of_objects(name):
    number = 100 if name == "dino-4scale_internimage_t_1x_coco" else 300
    assert build_model(name).test_cfg.max_per_img == number


def test_dino_transformer(dino):
    encoding = dino.positional_encoding
    assert (encoding.num_feats, encoding.temperature) == (128, 20)
    assert (encoding.normalize, encoding.offset) == (True, 0)
    assert (len(dino.encoder.layers), len(dino.decoder.layers)) == (6, 6)
    attention = [layer.self_attn for layer in dino.encoder.layers]
    attention += [layer.cross_attn for layer in dino.decoder.layers]
    for module in attention:
        assert (module.num_levels, module.num_points, module.num_heads) == (4, 4, 8)
    dropout = [m.p for part in (dino.encoder, dino.decoder) for m in part.modules()
               if isinstance(m, nn.Dropout)]  # fmt: skip
    assert dropout
    assert set(dropout) == {0.0}


def test_ema_uses_the_published_momentum():
    name = "cascade_mask_rcnn_flash_internimage_l_fpn_3x_coco"
    (average,) = (hook for hook in load_config(name).custom_hooks if hook.type == "EMAHook")
    hook = HOOKS.build(average)
    model = nn.BatchNorm1d(1)
    runner = SimpleNamespace(model=model, iter=0)
    hook.before_run(runner)
    expected = 0.0
    for step in range(4):
        model.weight.data.fill_(step + 1.0)
        model.running_mean.fill_(step + 1.0)
        hook.after_train_iter(runner, step)
        # mmengine starts with a copy, the published average with 0.9995 of the weights.
        momentum = (1 - 1e-4) * exp(-(1 + step) / 2000) + 1e-4 if step else 1.0
        expected += momentum * (step + 1.0 - expected)
    assert expected != pytest.approx(4.0, rel=1e-5)
    averaged = hook.ema_model.module
    assert averaged.weight.item() == pytest.approx(expected, rel=1e-6)
    assert averaged.running_mean.item() == pytest.approx(expected, rel=1e-6)


@pytest.fixture(scope="module")
def tiny_coco(tmp_path_factory) -> Path:
    """Write the folders of COCO with two images of noise and three objects."""
    root = tmp_path_factory.mktemp("coco")
    (root / "annotations").mkdir()
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (96, 128, 3), np.uint8) for _ in range(2)]
    images = [{"id": i, "file_name": f"{i}.png", "height": 96, "width": 128} for i in range(2)]
    annotations = []
    for i, (image, x, y, w, h) in enumerate(
        [(0, 10, 20, 60, 50), (1, 30, 5, 40, 80), (1, 60, 40, 50, 40)]
    ):
        corners = [x, y, x + w, y, x + w, y + h, x, y + h]
        what = {"id": i + 1, "image_id": image, "category_id": i, "iscrowd": 0}
        where = {"bbox": [x, y, w, h], "area": w * h, "segmentation": [corners]}
        annotations.append({**what, **where})
    categories = [{"id": i, "name": name} for i, name in enumerate(CocoDataset.METAINFO["classes"])]
    content = {"images": images, "annotations": annotations, "categories": categories}
    for part in ("train2017", "val2017"):
        (root / part).mkdir()
        for image, picture in zip(images, pictures, strict=True):
            cv2.imwrite(str(root / part / image["file_name"]), picture)
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
    return root


ONE_OF_EACH_FAMILY = {
    "mask_rcnn_flash_internimage_t_fpn_1x_coco": {
        "model.neck.in_channels": [32, 64, 128, 256],
        "model.train_cfg.rpn_proposal.max_per_img": 20,
        "model.train_cfg.rcnn.sampler.num": 8,
        "model.roi_head.bbox_head.fc_out_channels": 32,
    },
    "mask_rcnn_internimage_t_fpn_1x_coco": {
        "model.backbone.arch": "tiny",
        "model.backbone.channels": 32,
        "model.backbone.depths": [1, 1, 2, 1],
        "model.backbone.groups": [2, 4, 8, 16],
        "model.neck.in_channels": [32, 64, 128, 256],
        "model.train_cfg.rpn_proposal.max_per_img": 20,
        "model.train_cfg.rcnn.sampler.num": 8,
        "model.roi_head.bbox_head.fc_out_channels": 32,
    },
    "cascade_mask_rcnn_flash_internimage_l_fpn_3x_coco": {
        "model.neck.in_channels": [32, 64, 128, 256],
        "model.train_cfg.rpn_proposal.max_per_img": 20,
        **{f"model.train_cfg.rcnn.{stage}.sampler.num": 8 for stage in range(3)},
        **{f"model.roi_head.bbox_head.{stage}.fc_out_channels": 32 for stage in range(3)},
    },
    "dino-4scale_flash_internimage_t_1x_coco": {
        "model.neck.in_channels": [64, 128, 256],
        "model.encoder.num_layers": 2,
        "model.decoder.num_layers": 2,
        "model.num_queries": 20,
        "model.dn_cfg.group_cfg.num_dn_queries": 4,
    },
}


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_a_test_image_is_resized_and_padded(name, tiny_coco):
    config = load_config(name)
    dataset = DATASETS.build({**config.val_dataloader.dataset, "data_root": tiny_coco})
    sample = dataset[0]
    assert sample["inputs"].shape == (3, 800, 1067)
    batch = MODELS.build(config.model.data_preprocessor)(pseudo_collate([sample]))
    assert batch["inputs"].shape == (1, 3, 800, 1088)


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_all_parameters_of_a_small_copy_receive_a_gradient(name, tiny_coco):
    # A parameter without gradient stops distributed training.
    torch.manual_seed(0)
    np.random.seed(0)
    config = copy.deepcopy(load_config(name))
    config.model.backbone.update(arch="nano", drop_path_rate=0.0, init_cfg=None)
    config.merge_from_dict(ONE_OF_EACH_FAMILY[name])
    model = MODELS.build(config.model)
    model.init_weights()
    data = config.train_dataloader.dataset
    pipeline = an_eighth(data.pipeline)
    dataset = DATASETS.build({**data, "data_root": tiny_coco, "pipeline": pipeline})
    batch = model.data_preprocessor(pseudo_collate([dataset[0], dataset[1]]), training=True)
    assert all(size % 32 == 0 for size in batch["inputs"].shape[-2:])
    loss, _ = model.parse_losses(model.loss(batch["inputs"], batch["data_samples"]))
    loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
