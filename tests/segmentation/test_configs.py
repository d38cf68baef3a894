"""Compare the configs and their segmentors with the published recipes."""

import copy
import functools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.hooks import ParamSchedulerHook
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.structures import PixelData
from mmseg.datasets import ADE20KDataset
from mmseg.registry import HOOKS, METRICS, MODELS, PARAM_SCHEDULERS, VISUALIZERS
from mmseg.structures import SegDataSample
from torch import nn

from flash_internimage.openmmlab.cli import config as program
from flash_internimage.openmmlab.cli.train import training_parser
from tests import recipes
from tests.recipes import DATA, ROOT, plain, read_recipes, without

RECIPES = read_recipes("segmentation_recipes.csv")
UPERNET = [name for name in RECIPES if name.startswith("upernet")]
MASK2FORMER = [name for name in RECIPES if name.startswith("mask2former")]
UPERNET_T = "upernet_flash_internimage_t_512_160k_ade20k"
MASK2FORMER_H = "mask2former_internimage_h_896_80k_cocostuff2ade20k"
MASK2FORMER_L = "mask2former_flash_internimage_l_640_160k_ade20k"
EMBEDDINGS = [
    f"decode_head.{name}"
    for name in ("mask_embed", "cls_embed", "level_embed", "query_embed", "query_feat")
]
DEPTHS = {
    "t": (4, 4, 18, 4),
    "s": (4, 4, 21, 4),
    "b": (4, 4, 21, 4),
    "l": (5, 5, 22, 5),
    "xl": (5, 5, 24, 5),
    "h": (6, 6, 32, 6),
}

# Transforms of the published training and testing, under the names of mmengine.
DATASET = "CheckedADE20KDataset"
ANNOTATIONS = {"type": "LoadCheckedAnnotations"}
LOAD = {"type": "LoadImageFromFile"}
TO_MULTIPLES_OF_32 = {"type": "ResizeToMultiple", "size_divisor": 32}
PACK = {"type": "PackSegInputs"}


def resize(scale: list[int]) -> dict:
    return {"type": "Resize", "scale": scale, "keep_ratio": True}


pytestmark = pytest.mark.usefixtures("mmseg_scope")
load_config = functools.partial(recipes.load_config, "segmentation")
build_model = functools.partial(recipes.build_model, "segmentation")


@pytest.fixture(params=RECIPES)
def recipe(request) -> dict[str, str]:
    return RECIPES[request.param]


@pytest.fixture
def config(recipe) -> Config:
    return load_config(recipe["config"])


@pytest.fixture
def model(recipe) -> nn.Module:
    return build_model(recipe["config"])


def is_mask2former(recipe: dict[str, str]) -> bool:
    return recipe["config"].startswith("mask2former")


def published(family: str) -> dict:
    """Return the published config of a small model of the same family."""
    return json.loads((DATA / "openmmlab" / family / "config.json").read_text())["model"]


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split()]


def test_every_config_has_a_recipe():
    files = (ROOT / "configs" / "segmentation").glob("*ade20k.py")
    assert {file.stem for file in files} == set(RECIPES)


# training


def test_config_in_the_guide_for_own_data(tmp_path):
    guide = (ROOT / "docs" / "own-data.md").read_text().partition("## Segmentation\n")[2]
    code = guide.split("```python\n")[1].split("```")[0]
    path = tmp_path / "leaves.py"
    path.write_text(code)
    config = program.config_of(training_parser("train", "").parse_args([str(path)]))
    loaders = config.train_dataloader, config.val_dataloader, config.test_dataloader
    for loader, split in zip(loaders, ("train", "val", "val"), strict=True):
        assert loader.dataset.type == "CheckedSegDataset"
        assert loader.dataset.data_root == "data/leaves/"
        assert loader.dataset.data_prefix.img_path == f"{split}/images"
        assert loader.dataset.data_prefix.seg_map_path == f"{split}/labels"
        assert loader.dataset.metainfo.classes == ("background", "leaf", "stem")
    assert config.model.decode_head.num_classes == 3
    assert config.model.auxiliary_head.num_classes == 3
    assert [schedule["end"] for schedule in config.param_scheduler] == [501, 20001]
    assert Path(config.load_from).name == RECIPES[UPERNET_T]["checkpoint"]


def test_accumulation_options_in_the_guide_keep_the_schedule():
    text = (ROOT / "docs" / "segmentation.md").read_text()
    options = re.search(r"--cfg-options (optim_wrapper.accumulative_counts=[^`]*)```", text)[1]
    config = copy.deepcopy(load_config(UPERNET_T))
    config.merge_from_dict(dict(option.split("=") for option in options.split()))
    counts = int(config.optim_wrapper.accumulative_counts)
    assert int(config.train_cfg.max_iters) == 160000 * counts
    assert int(config.train_cfg.val_interval) == 16000 * counts
    warm_up, poly = config.param_scheduler
    assert int(warm_up["end"]) == 1500 * counts + 1
    assert int(poly["end"]) == 160000 * counts + 1


def test_optimizer(recipe, config):
    expected = {
        "type": "OptimWrapper",
        "constructor": "InternImageLayerDecayOptimizerConstructor",
        "optimizer": {
            "type": "AdamW",
            "lr": float(recipe["lr"]),
            "weight_decay": float(recipe["weight_decay"]),
        },
        "paramwise_cfg": {
            "layer_decay_rate": float(recipe["layer_decay_rate"]),
            "offset_lr_scale": 1.0,
        },
    }
    if is_mask2former(recipe):
        expected["paramwise_cfg"]["first_layer"] = EMBEDDINGS
    if recipe["clip_norm"]:
        expected["clip_grad"] = {"max_norm": float(recipe["clip_norm"]), "norm_type": 2}
    assert plain(config.optim_wrapper) == expected


def settings(config: Config, model: nn.Module) -> dict[str, tuple[float, float]]:
    """Return the learning rate and weight decay of every parameter."""
    groups = build_optim_wrapper(model, config.optim_wrapper).optimizer.param_groups
    assert {group["betas"] for group in groups} == {(0.9, 0.999)}
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups
             for p in group["params"]}  # fmt: skip
    return {name: found[id(parameter)] for name, parameter in model.named_parameters()}


def published_settings(name: str, ndim: int, recipe: dict[str, str]) -> tuple[float, float]:
    """Return the published learning rate and weight decay of a parameter.

    InternImage-H has norms after some blocks of the third stage. They have the rate of their block;
    the published code takes their number for that of a block.
    """
    size = re.search(r"_internimage_([a-z]+)_", recipe["config"])[1]
    depths, layers = DEPTHS[size], int(recipe["layers"])
    _, part, *place = name.split(".")
    layer = layers + 1
    if name.startswith("backbone.patch_embed.") or name.startswith(tuple(EMBEDDINGS)):
        layer = 0
    elif part == "levels":
        stage, *block = place
        # Norm and downsampling belong to the next stage; in the last one, to its first block.
        if block[0] == "blocks":
            layer = 1 + sum(depths[: int(stage)]) + int(block[1])
        elif block[0] == "post_norms":
            layer = 1 + sum(depths[: int(stage)]) + (5, 11, 17, 23, 29)[int(block[1])]
        else:
            layer = 1 + sum(depths[: min(int(stage) + 1, 3)])
    lr = float(recipe["lr"]) * float(recipe["layer_decay_rate"]) ** (layers + 1 - layer)
    exempt = ndim == 1 or name.endswith(".bias") or "norm" in name or "sampling_offsets" in name
    return lr, 0.0 if exempt else float(recipe["weight_decay"])


def test_learning_rates_and_weight_decay_of_all_parameters(recipe, config, model):
    assert settings(config, model) == {
        name: (pytest.approx(lr, rel=1e-9), decay)
        for name, parameter in model.named_parameters()
        for lr, decay in [published_settings(name, parameter.ndim, recipe)]
    }


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        (
            "upernet_flash_internimage_l_640_160k_ade20k",
            {
                "backbone.patch_embed.conv1.weight": 2e-5 * 0.94**38,
                "backbone.levels.3.blocks.4.mlp.fc1.weight": 2e-5 * 0.94,
                "decode_head.conv_seg.weight": 2e-5,
                "auxiliary_head.convs.0.conv.weight": 2e-5,
            },
        ),
        (
            "mask2former_flash_internimage_t_512_160k_ade20k",
            {
                "backbone.patch_embed.conv1.weight": 1e-4 * 0.9**31,
                "backbone.levels.3.blocks.3.mlp.fc1.weight": 1e-4 * 0.9,
                "decode_head.query_feat.weight": 1e-4 * 0.9**31,
                "decode_head.mask_embed.0.weight": 1e-4 * 0.9**31,
                "decode_head.pixel_decoder.level_encoding.weight": 1e-4,
                "decode_head.transformer_decoder.post_norm.weight": 1e-4,
            },
        ),
        (
            MASK2FORMER_L,
            {
                "decode_head.cls_embed.weight": 1e-4 * 0.94**38,
                "decode_head.pixel_decoder.mask_feature.weight": 1e-4,
            },
        ),
    ],
)
def test_learning_rates_decrease_from_the_heads_to_the_stem(name, rates):
    found = settings(load_config(name), build_model(name))
    assert {parameter: found[parameter][0] for parameter in rates} == pytest.approx(rates)


@functools.cache
def factors(schedulers: str, iterations: int) -> list[float]:
    """Return the factor of the learning rate in each iteration."""
    optimizer = OptimWrapper(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0))
    optimizer.step()
    schedules = json.loads(schedulers)
    schedules = [PARAM_SCHEDULERS.build({**cfg, "optimizer": optimizer}) for cfg in schedules]
    runner, hook, found = SimpleNamespace(param_schedulers=schedules), ParamSchedulerHook(), []
    for iteration in range(iterations):
        found.append(optimizer.param_groups[0]["lr"])
        hook.after_train_iter(runner, iteration)
    return found


def published_factor(iteration: int, iterations: int) -> float:
    falling = 1 - iteration / iterations
    if iteration < 1500:
        return falling * (1 - (1 - iteration / 1500) * (1 - 1e-6))
    return falling


def test_learning_rate_schedule(recipe, config):
    iterations = int(recipe["iterations"])
    found = factors(json.dumps(plain(config.param_scheduler)), iterations)
    expected = [published_factor(i, iterations) for i in range(iterations)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_length_and_validation(recipe, config):
    assert plain(config.train_cfg) == {
        "type": "IterBasedTrainLoop",
        "max_iters": int(recipe["iterations"]),
        "val_interval": int(recipe["val_interval"]),
    }


def test_images_per_update(recipe, config):
    images, total = int(recipe["images_per_gpu"]), int(recipe["images_per_update"])
    assert config.train_dataloader.batch_size == images
    assert plain(config.auto_scale_lr) == {"enable": False, "base_batch_size": total}
    first_line = Path(config.filename).read_text().splitlines()[0]
    assert first_line == f"# {total // images} GPUs x {images} image{'s' * (images > 1)}"


def test_hooks(recipe, config):
    names = "CheckSegmentorHook", "CheckFiniteHook", "CurvesHook"
    hooks = [{"type": name} for name in names]
    if is_mask2former(recipe):
        hooks.append({"type": "FlashAttentionHook"})
    assert plain(config.custom_hooks) == hooks
    assert plain(config.default_hooks.checkpoint) == {
        "type": "AtomicCheckpointHook",
        "by_epoch": False,
        "interval": 1000,
        "max_keep_ckpts": 1,
        "save_best": "mIoU",
        "save_last": True,
    }


class Data(list):
    metainfo = ADE20KDataset.METAINFO


def test_the_settings_pass_the_checks(config, model):
    data = Data([{}])
    data.pipeline = Compose(config.test_dataloader.dataset.pipeline)
    loop = SimpleNamespace(dataloader=SimpleNamespace(dataset=data))
    hook = HOOKS.build(config.custom_hooks[0])
    hook.before_run(SimpleNamespace(model=model, _train_loop={}, _val_loop={}, _test_loop=loop))


def test_names_of_the_runtime_are_registered(config):
    for hook in (*config.default_hooks.values(), *config.custom_hooks):
        assert HOOKS.get(hook.type), hook.type
    assert HOOKS.build(config.default_hooks.checkpoint).rules == ["greater"]
    assert METRICS.build(config.val_evaluator).metrics == ["mIoU"]
    assert VISUALIZERS.get(config.visualizer.type)


# data


def dataset(part: str, pipeline: list[dict], **others) -> dict:
    prefix = {"img_path": f"images/{part}", "seg_map_path": f"annotations/{part}"}
    root = "data/ade/ADEChallengeData2016"
    return {
        "type": DATASET,
        "data_root": root,
        "data_prefix": prefix,
        "pipeline": pipeline,
    } | others


def test_training_data(recipe, config):
    crop = [int(recipe["crop"])] * 2
    pipeline = [
        {"type": "LoadReadableImage"},
        ANNOTATIONS,
        {
            "type": "RandomResize",
            "scale": numbers(recipe["train_scale"]),
            "ratio_range": [0.5, 2.0],
            "keep_ratio": True,
        },
        {"type": "RandomCrop", "crop_size": crop, "cat_max_ratio": 0.75},
        {"type": "RandomFlip", "prob": 0.5},
        {"type": "PhotoMetricDistortion"},
        PACK,
    ]
    assert plain(config.train_dataloader) == {
        "batch_size": int(recipe["images_per_gpu"]),
        "num_workers": int(recipe["workers_per_gpu"]),
        "persistent_workers": True,
        "sampler": {"type": "InfiniteSampler", "shuffle": True},
        "dataset": dataset("training", pipeline),
    }


def test_test_data(recipe, config):
    to_multiples = [TO_MULTIPLES_OF_32] * (recipe["resize_to_multiple"] == "yes")
    pipeline = [LOAD, resize(numbers(recipe["test_scale"])), *to_multiples, ANNOTATIONS, PACK]
    assert plain(config.test_dataloader) == {
        "batch_size": 1,
        "num_workers": int(recipe["workers_per_gpu"]),
        "persistent_workers": True,
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "dataset": dataset("validation", pipeline, test_mode=True),
    }
    assert plain(config.test_evaluator) == {"type": "IoUMetric", "iou_metrics": ["mIoU"]}
    assert config.val_dataloader == config.test_dataloader
    assert config.val_evaluator == config.test_evaluator


def test_multi_scale_data(recipe, config):
    to_multiples = [[TO_MULTIPLES_OF_32]] * (recipe["resize_to_multiple"] == "yes")
    transforms = [
        [resize([4 * side, side]) for side in numbers(recipe["several_short_sides"])],
        *to_multiples,
        [{"type": "RandomFlip", "prob": 0.0}, {"type": "RandomFlip", "prob": 1.0}],
        [ANNOTATIONS],
        [PACK],
    ]
    assert plain(config.tta_pipeline) == [LOAD, {"type": "TestTimeAug", "transforms": transforms}]
    assert plain(config.tta_model) == {"type": "SegTTAModel"}


def test_all_configs_but_one_resize_to_multiples():
    assert [name for name in RECIPES if RECIPES[name]["resize_to_multiple"] == "no"] == [UPERNET_T]


def test_images_are_normalized_and_padded_to_the_crop(recipe, config):
    preprocessor = MODELS.build(config.model.data_preprocessor)
    crop = int(recipe["crop"])
    image = torch.randint(256, (3, crop - 100, crop - 7), dtype=torch.uint8)
    labels = PixelData(data=torch.ones(1, crop - 100, crop - 7, dtype=torch.int64))
    data = {"inputs": [image], "data_samples": [SegDataSample(gt_sem_seg=labels)]}
    batch = preprocessor(data, training=True)
    inputs, truth = batch["inputs"], batch["data_samples"][0].gt_sem_seg.data
    mean, std = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])[..., None, None]
    expected = torch.zeros(1, 3, crop, crop)
    expected[0, :, : crop - 100, : crop - 7] = (image.flip(0) - mean) / std
    torch.testing.assert_close(inputs, expected)
    assert truth.shape == (1, crop, crop)
    assert (truth == 1).sum() == (crop - 100) * (crop - 7)
    assert (truth[:, crop - 100 :] == 255).all()
    assert (truth[..., crop - 7 :] == 255).all()


# models


def test_backbone(recipe, model):
    recipes.assert_published_backbone(model.backbone, recipe)
    assert model.backbone.out_indices == (0, 1, 2, 3)


def test_parameters(recipe, model):
    recipes.assert_published_parameters(model, recipe)


def test_whole_images_are_segmented(config):
    assert plain(config.model.test_cfg) == {"mode": "whole"}


WIDTHS = {"in_channels", "channels", "num_classes"}


@pytest.mark.parametrize("name", UPERNET)
@pytest.mark.parametrize("head", ["decode_head", "auxiliary_head"])
def test_heads_of_upernet_equal_the_published_ones(name, head):
    config = plain(load_config(name).model)
    expected = published("upernet")
    assert without(config[head], WIDTHS) == without(expected[head], WIDTHS)
    assert config["train_cfg"] == expected["train_cfg"]


@pytest.fixture(params=MASK2FORMER)
def mask2former(request) -> dict[str, str]:
    return RECIPES[request.param]


def test_losses_and_matching_of_mask2former_equal_the_published_ones(mask2former):
    head, expected = (
        plain(load_config(mask2former["config"]).model.decode_head),
        published("mask2former"),
    )

    def current(part: dict) -> dict:
        return {**part, "type": f"mmdet.{part['type']}"}

    for loss in ("loss_mask", "loss_dice"):
        assert head[loss] == current(expected["decode_head"][loss])
    classes = current(expected["decode_head"]["loss_cls"])
    *weights, of_no_object = classes.pop("class_weight")
    assert head["loss_cls"].pop("class_weight") == [weights[0]] * 150 + [of_no_object]
    assert head["loss_cls"] == classes
    training, assigner = expected["train_cfg"], expected["train_cfg"]["assigner"]
    assert head["train_cfg"] == {
        **{key: training[key] for key in ("num_points", "oversample_ratio")},
        "importance_sample_ratio": training["importance_sample_ratio"],
        "assigner": {
            "type": "mmdet.HungarianAssigner",
            "match_costs": [current(assigner[f"{kind}_cost"]) for kind in ("cls", "mask", "dice")],
        },
        "sampler": current(training["sampler"]),
    }


def width(recipe: dict[str, str]) -> int:
    """Return the channels of the head of Mask2Former."""
    return 1024 if recipe["config"] == MASK2FORMER_H else 256


def test_mask2former(mask2former):
    head = build_model(mask2former["config"]).decode_head
    assert type(head).__name__ == "CombineFirstMask2FormerHead"
    assert head.combine_first
    assert (head.num_classes, head.ignore_index) == (150, 255)
    assert head.num_queries == int(mask2former["queries"])
    assert head.num_transformer_feat_level == 3
    assert not head.align_corners
    for encoding in (head.decoder_positional_encoding, head.pixel_decoder.postional_encoding):
        assert (encoding.num_feats, encoding.normalize) == (width(mask2former) // 2, True)
        assert (encoding.temperature, encoding.offset) == (10000, 0)


def test_transformers_of_mask2former(mask2former):
    head = build_model(mask2former["config"]).decode_head
    pixels, queries = head.pixel_decoder.encoder.layers, head.transformer_decoder.layers
    assert (len(pixels), len(queries)) == (6, 9)
    heads = width(mask2former) // 32
    for layer in pixels:
        attention = layer.self_attn
        assert (attention.num_levels, attention.num_points, attention.num_heads) == (3, 4, heads)
        assert layer.ffn.feedforward_channels == int(mask2former["pixel_decoder_ffn"])
    for layer in queries:
        assert layer.self_attn.num_heads == layer.cross_attn.num_heads == heads
        assert layer.ffn.feedforward_channels == (4096 if heads == 32 else 2048)
    modules = list(head.modules())
    dropout = [m.p for m in modules if isinstance(m, nn.Dropout)]
    dropout += [m.dropout for m in modules if isinstance(m, nn.MultiheadAttention)]
    assert dropout
    assert set(dropout) == {0.0}
    assert all(isinstance(layer.ffn.layers[0][1], nn.ReLU) for layer in (*pixels, *queries))
