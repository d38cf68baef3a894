"""Test learning rates and weight decay of all parameters in the published recipes."""

import json
from pathlib import Path
from typing import NamedTuple

import mmdet
import mmdet.registry
import mmseg
import mmseg.registry
import pytest
import torch
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import LinearLR, OptimWrapper, build_optim_wrapper
from mmengine.registry import DefaultScope
from torch import nn

from flash_internimage.checkpoints import convert_state_dict
from flash_internimage.openmmlab import (
    FlashInternImageBackbone,
    InternImageBackbone,
    InternImageLayerDecayOptimizerConstructor,
)

DATA = Path("tests/data")
# Layer numbers of the first block of each stage, of the last block and of the heads.
LAYERS = {
    "tiny": ((1, 5, 9, 27), 30, 31),
    "small": ((1, 5, 9, 30), 33, 34),
    "base": ((1, 5, 9, 30), 33, 34),
    "large": ((1, 6, 11, 33), 37, 38),
}
EMBEDDINGS = tuple(
    f"decode_head.{name}"
    for name in ("mask_embed", "cls_embed", "level_embed", "query_embed", "query_feat")
)


class Recipe(NamedTuple):
    schema: str
    arch: str
    lr: float
    weight_decay: float
    rate: float
    num_layers: int
    offset_lr_scale: float = 1.0

    @property
    def scope(self) -> str:
        return "mmseg" if "ade20k" in self.schema else "mmdet"

    @property
    def first_layer(self) -> tuple[str, ...]:
        return EMBEDDINGS if "mask2former" in self.schema else ()


# The 1x and 3x schedules share names and shapes.
MASK_RCNN = "mask_rcnn_flash_intern_image_{}_fpn_1x_coco"
CASCADE = "cascade_flash_intern_image_l_fpn_1x_coco"
DINO = "dino_4scale_flash_internimage_{}_1x_coco"
UPERNET = "upernet_flash_internimage_{}_{}_160k_ade20k"
MASK2FORMER = "mask2former_flash_internimage_{}_{}_160k_ade20k_ss"
DINO_T = Recipe(DINO.format("t"), "tiny", 2e-4, 1e-4, 0.9, 30)
MASK2FORMER_T = Recipe(MASK2FORMER.format("t", 512), "tiny", 1e-4, 0.05, 0.9, 30)
RECIPES = [
    Recipe(MASK_RCNN.format("t"), "tiny", 1e-4, 0.05, 1.0, 30),
    Recipe(MASK_RCNN.format("s"), "small", 1e-4, 0.05, 1.0, 33),
    Recipe(MASK_RCNN.format("s"), "small", 2e-4, 0.05, 1.0, 33),
    Recipe(MASK_RCNN.format("b"), "base", 1e-4, 0.05, 1.0, 33),
    Recipe(MASK_RCNN.format("b"), "base", 2e-4, 0.05, 0.9, 33, offset_lr_scale=0.01),
    Recipe(CASCADE, "large", 1e-4, 0.05, 0.94, 37),
    Recipe(CASCADE, "large", 2e-4, 0.05, 0.9, 37, offset_lr_scale=0.01),
    DINO_T,
    Recipe(DINO.format("s"), "small", 2e-4, 1e-4, 0.9, 33),
    Recipe(DINO.format("b"), "base", 2e-4, 1e-4, 0.9, 33),
    Recipe(UPERNET.format("t", 512), "tiny", 6e-5, 0.05, 1.0, 30),
    Recipe(UPERNET.format("s", 512), "small", 6e-5, 0.05, 1.0, 33),
    Recipe(UPERNET.format("b", 512), "base", 6e-5, 0.05, 1.0, 33),
    Recipe(UPERNET.format("l", 640), "large", 2e-5, 0.05, 0.94, 37),
    MASK2FORMER_T,
    Recipe(MASK2FORMER.format("s", 640), "small", 1e-4, 0.05, 1.0, 33),
    Recipe(MASK2FORMER.format("b", 640), "base", 1e-4, 0.05, 1.0, 33),
    Recipe(MASK2FORMER.format("l", 640), "large", 1e-4, 0.05, 0.94, 37),
]


def schema(recipe: Recipe) -> dict[str, list[int]]:
    """Return the published names and shapes of the parameters, without buffers."""
    shapes = json.loads((DATA / "openmmlab_schemas" / f"{recipe.schema}.json").read_text())
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    return {name: shape for name, shape in shapes.items() if not name.endswith(buffers)}


def published_layer(name: str, recipe: Recipe) -> int:
    first_blocks, _, heads = LAYERS[recipe.arch]
    parts = name.split(".")
    if parts[:2] == ["backbone", "patch_embed"] or "level_embeds" in name:
        return 0
    if recipe.scope == "mmseg" and name.startswith(EMBEDDINGS):
        return 0
    if parts[:2] != ["backbone", "levels"]:
        return heads
    stage = int(parts[2])
    if parts[3] == "blocks":
        return first_blocks[stage] + int(parts[4])
    return first_blocks[3 if stage == 3 else stage + 1]


def published(name: str, shape: list[int], recipe: Recipe) -> tuple[float, float]:
    """Return the published learning rate and weight decay of a parameter."""
    lr = recipe.lr * recipe.rate ** (LAYERS[recipe.arch][2] - published_layer(name, recipe))
    if "offset_mask" in name and "offset_mask_dw" not in name:
        lr *= recipe.offset_lr_scale
    words = ("norm", "relative_position", "sampling_offsets")
    exempt = len(shape) == 1 or name.endswith(".bias") or any(word in name for word in words)
    return lr, 0.0 if exempt else recipe.weight_decay


def published_settings(recipe: Recipe) -> dict[str, tuple[float, float]]:
    """Return the published settings of all parameters by their current names."""
    return convert_state_dict(
        {name: published(name, shape, recipe) for name, shape in schema(recipe).items()}
    )


def add(model: nn.Module, name: str, shape: list[int]) -> None:
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(model, part):
            model.add_module(part, nn.Module())
        model = getattr(model, part)
    model.register_parameter(leaf, nn.Parameter(torch.empty(shape)))


def model_of(shapes: dict[str, list[int]], arch: str) -> nn.Module:
    """Build a backbone and parameters with these names on the meta device."""
    with torch.device("meta"):
        model = nn.Module()
        model.backbone = FlashInternImageBackbone(arch)
        for name, shape in shapes.items():
            if not name.startswith("backbone."):
                add(model, name, shape)
    assert {name: list(p.shape) for name, p in model.named_parameters()} == shapes
    return model


def optim_wrapper(model, lr, weight_decay, scope="mmengine", type_="OptimWrapper", **paramwise_cfg):
    with DefaultScope.overwrite_default_scope(scope):
        return build_optim_wrapper(
            model,
            {
                "type": type_,
                "constructor": "InternImageLayerDecayOptimizerConstructor",
                "optimizer": {"type": "AdamW", "lr": lr, "weight_decay": weight_decay},
                "paramwise_cfg": paramwise_cfg,
                "clip_grad": {"max_norm": 0.1},
            },
        )


def optim_wrapper_of(recipe: Recipe, model: nn.Module, **others) -> OptimWrapper:
    options = {
        "layer_decay_rate": recipe.rate,
        "offset_lr_scale": recipe.offset_lr_scale,
        "first_layer": recipe.first_layer,
    }
    return optim_wrapper(
        model, recipe.lr, recipe.weight_decay, scope=recipe.scope, **(options | others)
    )


def settings(wrapper: OptimWrapper, model: nn.Module) -> dict[str, tuple[float, float]]:
    """Return the learning rate and weight decay of every parameter."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = wrapper.optimizer.param_groups
    assert sum(len(group["params"]) for group in groups) == len(
        {parameter for group in groups for parameter in group["params"]}
    )
    return {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }


def approx(expected: dict[str, tuple[float, float]]) -> dict:
    return {name: (pytest.approx(lr, rel=1e-12), decay) for name, (lr, decay) in expected.items()}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: f"{r.schema}-{r.lr:g}")
def test_recipes_use_the_published_rates(recipe):
    model = model_of(convert_state_dict(schema(recipe)), recipe.arch)
    wrapper = optim_wrapper_of(recipe, model, num_layers=recipe.num_layers)
    expected = published_settings(recipe)
    assert settings(wrapper, model) == approx(expected)
    assert len(wrapper.optimizer.param_groups) == len(set(expected.values()))


@pytest.mark.parametrize(
    ("golden", "arch", "scope"),
    [("det_B_3x_offsetscale0.01", "base", "mmdet"), ("seg_T_m2f", "tiny", "mmseg")],
)
def test_groups_equal_those_of_the_published_constructor(golden, arch, scope):
    golden = json.loads((DATA / "optim" / f"{golden}.json").read_text())

    def current(name: str) -> str:  # renamed and moved since
        return "level_embed" if name.endswith(".level_embeds") else name

    shapes = {current(name): shape for name, shape in golden["param_shapes"].items()}
    model = model_of(shapes, arch)
    options = golden["paramwise_cfg"]
    assert model.backbone.depths == tuple(options.pop("depths"))
    if scope == "mmseg":
        options["first_layer"] = EMBEDDINGS
    wrapper = optim_wrapper(model, golden["lr"], golden["weight_decay"], scope, **options)
    assert settings(wrapper, model) == approx(
        {
            current(name): (group["lr"], group["weight_decay"])
            for group in golden["groups"]
            for name in group["param_names"]
        }
    )


def real_model(recipe: Recipe) -> nn.Module:
    """Build DINO or Mask2Former of OpenMMLab on the meta device."""
    package, file, indices = {
        "mmdet": (mmdet, "dino/dino-4scale_r50_8xb2-12e_coco.py", (1, 2, 3)),
        "mmseg": (mmseg, "mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py", (0, 1, 2, 3)),
    }[recipe.scope]
    cfg = Config.fromfile(Path(package.__file__).parent / ".mim" / "configs" / file).model
    cfg.backbone = {
        "type": "FlashInternImage",
        "arch": recipe.arch,
        "out_indices": indices,
    }
    behind = cfg.neck if recipe.scope == "mmdet" else cfg.decode_head
    behind.in_channels = [64 * 2**i for i in indices]
    registry = {"mmdet": mmdet.registry.MODELS, "mmseg": mmseg.registry.MODELS}[recipe.scope]
    with DefaultScope.overwrite_default_scope(recipe.scope), torch.device("meta"):
        return registry.build(cfg)


@pytest.mark.parametrize("recipe", [DINO_T, MASK2FORMER_T], ids=["DINO", "Mask2Former"])
def test_parameter_names_of_openmmlab_match_the_rules(recipe):
    model = real_model(recipe)
    assert settings(optim_wrapper_of(recipe, model), model) == approx(published_settings(recipe))


def test_level_embeddings_of_dino_and_mask2former_are_distinguished():
    dino, mask2former = real_model(DINO_T), real_model(MASK2FORMER_T)
    found = settings(optim_wrapper(dino, 1.0, 0.0, layer_decay_rate=0.9), dino)
    assert found["level_embed"][0] == pytest.approx(0.9**31)
    found = settings(optim_wrapper(mask2former, 1.0, 0.0, layer_decay_rate=0.9), mask2former)
    assert found["decode_head.level_embed.weight"][0] == 1.0


@pytest.mark.parametrize(("arch", "rate", "exponent"), [("tiny", 0.9, 31), ("large", 0.94, 38)])
def test_embeddings_of_mask2former_use_the_rate_of_the_stem(arch, rate, exponent):
    recipe = next(r for r in RECIPES if "mask2former" in r.schema and r.arch == arch)
    model = model_of(convert_state_dict(schema(recipe)), arch)
    found = settings(optim_wrapper_of(recipe, model), model)
    last = max(i for i in range(9) if f"backbone.levels.3.blocks.{i}.gamma1" in found)
    expected = {
        "backbone.patch_embed.conv1.weight": exponent,
        "decode_head.query_feat.weight": exponent,
        "decode_head.mask_embed.4.bias": exponent,
        "backbone.levels.0.blocks.0.gamma1": exponent - 1,
        "backbone.levels.0.blocks.1.gamma1": exponent - 2,
        f"backbone.levels.3.blocks.{last}.gamma1": 1,
        "decode_head.pixel_decoder.level_encoding.weight": 0,
    }
    assert {name: found[name][0] for name in expected} == {
        name: pytest.approx(recipe.lr * rate**power) for name, power in expected.items()
    }


class Small(nn.Module):
    """Model with a backbone of depths (1, 1, 2, 1)."""

    def __init__(self, **options):
        super().__init__()
        self.backbone = FlashInternImageBackbone("nano", **options)
        self.head = nn.Linear(2, 2)

    def forward(self, inputs, data_samples=None, mode="tensor"):
        return self.head(inputs)


def test_a_step_uses_the_rate_of_each_layer():
    model = Small()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wrapper = build_optim_wrapper(
        model,
        {
            "constructor": "InternImageLayerDecayOptimizerConstructor",
            "optimizer": {"type": "SGD", "lr": 0.1, "weight_decay": 0.0},
            "paramwise_cfg": {"layer_decay_rate": 0.5, "offset_lr_scale": 0.1},
        },
    )
    wrapper.update_params(sum(p.sum() for p in model.parameters()))
    for name, rate in (
        ("head.weight", 0.1),
        ("backbone.levels.3.blocks.0.mlp.fc1.weight", 0.05),
        ("backbone.levels.3.blocks.0.dcn.offset_mask.weight", 0.005),
        ("backbone.levels.2.downsample.conv.weight", 0.05),
        ("backbone.levels.2.blocks.1.mlp.fc1.weight", 0.025),
        ("backbone.levels.1.downsample.conv.weight", 0.0125),
        ("backbone.patch_embed.conv1.weight", 0.1 / 2**6),
    ):
        moved = before[name] - model.get_parameter(name).detach()
        torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=0, atol=1e-6)


def test_schedules_scale_all_groups():
    model = Small()
    wrapper = optim_wrapper(model, 1e-3, 0.05, layer_decay_rate=0.5)
    before = [group["lr"] for group in wrapper.param_groups]
    scheduler = LinearLR(wrapper, start_factor=0.01, by_epoch=False, end=10)
    assert [group["lr"] for group in wrapper.param_groups] == pytest.approx(
        [0.01 * lr for lr in before]
    )
    for _ in range(10):
        wrapper.step()
        scheduler.step()
    assert [group["lr"] for group in wrapper.param_groups] == pytest.approx(before)
    assert wrapper.get_lr()["base_lr"] == [pytest.approx(1e-3)]  # the rate in the log


def test_groups_are_few_and_have_descriptive_names():
    groups = optim_wrapper(Small(), 1.0, 0.05, layer_decay_rate=0.5).optimizer.param_groups
    names = [group["group_name"] for group in groups]
    assert len(set(names)) == len(names) == 2 * 7  # stem, five blocks, head
    assert {"lr x 0.5, weight decay 0.05", "lr x 0.01562, weight decay 0"} < set(names)
    assert {group["lr_scale"] for group in groups} == {0.5**i for i in range(7)}


def test_frozen_parameters_are_left_out():
    model = Small(frozen_stages=2)
    found = settings(optim_wrapper(model, 1.0, 0.05, layer_decay_rate=0.5), model)
    assert set(found) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith("backbone.levels.1") for name in found)
    assert found["backbone.levels.3.blocks.0.gamma1"] == (0.5, 0.0)


def test_model_wrapped_for_distributed_training():
    model = Small()
    alone = settings(optim_wrapper(model, 1.0, 0.05, layer_decay_rate=0.5), model)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = MMDistributedDataParallel(model)
        wrapper = optim_wrapper(wrapped, 1.0, 0.05, layer_decay_rate=0.5)
    finally:
        torch.distributed.destroy_process_group()
    assert settings(wrapper, model) == alone


@pytest.mark.parametrize("type_", ["AmpOptimWrapper", "BFloat16OptimWrapper"])
def test_mixed_precision(type_, monkeypatch):
    amp = "mmengine.optim.optimizer.amp_optimizer_wrapper"
    monkeypatch.setattr(f"{amp}.is_cuda_available", lambda: True)
    monkeypatch.setattr(f"{amp}.GradScaler", lambda: torch.amp.GradScaler("cpu"))
    model = Small()
    wrapper = optim_wrapper(model, 1.0, 0.05, type_=type_, layer_decay_rate=0.5)
    expected = settings(optim_wrapper(model, 1.0, 0.05, layer_decay_rate=0.5), model)
    assert type(wrapper).__name__ == type_
    assert settings(wrapper, model) == expected


@pytest.mark.parametrize("registry", [mmdet.registry, mmseg.registry])
def test_projects_find_it_in_their_registries(registry):
    constructors = registry.OPTIM_WRAPPER_CONSTRUCTORS
    assert (
        constructors.get("InternImageLayerDecayOptimizerConstructor")
        is InternImageLayerDecayOptimizerConstructor
    )
    own = constructors.get("LearningRateDecayOptimizerConstructor")
    assert own.__module__.startswith(registry.__name__.split(".")[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "layer_decay_rate must be greater than 0 and at most 1, got None"),
        ({"layer_decay_rate": 0}, "layer_decay_rate must be greater than 0 and at most 1, got 0"),
        (
            {"layer_decay_rate": 1.1},
            "layer_decay_rate must be greater than 0 and at most 1, got 1.1",
        ),
        (
            {"layer_decay_rate": "0.9"},
            "layer_decay_rate must be greater than 0 and at most 1, got '0.9'",
        ),
        (
            {"decay_rate": 0.9, "depths": (1, 1, 2, 1)},
            "paramwise_cfg must only have layer_decay_rate, num_layers, offset_lr_scale, "
            "first_layer, got decay_rate, depths",
        ),
        ({"num_layers": 30}, r"number of blocks, 5 \(1, 1, 2, 1\), or be left out, got 30"),
        ({"offset_lr_scale": -1}, "offset_lr_scale must be at least 0, got -1"),
        ({"first_layer": "head"}, "first_layer must be a list of names, got 'head'"),
        ({"first_layer": ["hea"]}, "first_layer must list parameters.* of Small, got 'hea'"),
    ],
)
def test_options_are_checked(options, message):
    if options and "decay_rate" not in options:
        options = {"layer_decay_rate": 0.9} | options
    with pytest.raises(ValueError, match=message):
        optim_wrapper(Small(), 1.0, 0.05, **options)


@pytest.mark.parametrize("missing", ["lr", "weight_decay"])
def test_optimizer_without_rate_or_decay_is_an_error(missing):
    with pytest.raises(ValueError, match=f"optimizer must have {missing}"):
        optim_wrapper(Small(), **{"lr": 1.0, "weight_decay": 0.05} | {missing: None})


def test_norms_within_a_stage_of_internimage_have_the_rate_of_the_block_before():
    with torch.device("meta"):
        model = nn.Module()
        model.backbone = InternImageBackbone(
            channels=16,
            depths=(1, 1, 3, 1),
            groups=(1, 2, 4, 8),
            level2_post_norm=True,
            level2_post_norm_block_ids=(0, 2),
        )
    wrapper = optim_wrapper(model, 1.0, 0.05, layer_decay_rate=0.5)
    rates = {id(p): group["lr"] for group in wrapper.param_groups for p in group["params"]}
    stage = model.backbone.levels[2]
    for norm, block in zip(stage.post_norms, (0, 2), strict=True):
        assert rates[id(norm[0].weight)] == rates[id(stage.blocks[block].norm1[0].weight)]


def test_the_factor_of_offsets_does_not_apply_to_internimage():
    with torch.device("meta"):
        model = nn.Module()
        model.backbone = InternImageBackbone(channels=16, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8))
    found = settings(
        optim_wrapper(model, 1.0, 0.05, layer_decay_rate=0.5, offset_lr_scale=0.01), model
    )
    for name in ("offset", "mask", "input_proj"):
        assert found[f"backbone.levels.3.blocks.0.dcn.{name}.weight"] == (0.5, 0.05)


def test_model_without_our_backbone_is_an_error():
    message = r"model\.backbone must be a FlashInternImage or InternImage, got NoneType in Linear; "
    with pytest.raises(ValueError, match=message):
        optim_wrapper(nn.Linear(2, 2), 1.0, 0.05, layer_decay_rate=0.9)
    model = nn.Sequential()
    model.backbone = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="InternImage, got Linear in Sequential"):
        optim_wrapper(model, 1.0, 0.05, layer_decay_rate=0.9)
