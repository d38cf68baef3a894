"""Tests of the backbone: published values, names and initialization, and timm's interface."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import group_parameters
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._ops import OpOverload
from torch.utils.flop_counter import FlopCounterMode

from flash_internimage import FlashInternImage
from ops_dcnv4 import DCNv4, decompositions
from tests.flash_internimage.models import SMALL, STYLES, images

DATA = Path(__file__).parents[1] / "data"
GOLDENS = sorted((DATA / "backbone").glob("*.npz"))
NAMES = {
    "T": "flash_internimage_tiny",
    "S": "flash_internimage_small",
    "B": "flash_internimage_base",
    "L": "flash_internimage_large",
}
RELEASED = [
    "flash_internimage_base.in1k",
    "flash_internimage_large.in22k_384",
    "flash_internimage_large.in22k_ft_in1k_384",
    "flash_internimage_small.in1k",
    "flash_internimage_tiny.in1k",
]
CONFIGURED = sorted([*RELEASED, "flash_internimage_nano.untrained"])

pytestmark = pytest.mark.usefixtures("one_thread")


def small_model(**kwargs) -> FlashInternImage:
    """Return a small model in eval mode with non-zero offsets, unlike a freshly initialized one."""
    torch.manual_seed(0)
    model = FlashInternImage(**{**SMALL, **kwargs})
    for module in model.modules():
        if isinstance(module, DCNv4):
            nn.init.normal_(module.offset_mask.weight, std=0.1)
            nn.init.normal_(module.offset_mask.bias, std=0.5)
    return model.eval()


def meta_model(name: str, **kwargs) -> nn.Module:
    """Return a registered model on the meta device, which skips the slow initialization."""
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def read_json(path: str) -> dict:
    return json.loads((DATA / path).read_text())


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    loss = model(x).square().sum()
    grads = torch.autograd.grad(loss, tuple(parameters.values()))
    return dict(zip(parameters, grads, strict=True))


# --- Published values ---------------------------------------------------------------------------


def load_golden(path: Path) -> tuple[dict[str, np.ndarray], FlashInternImage]:
    golden = dict(np.load(path))
    config = json.loads(str(golden["config_json"]))
    for name in ("core_op", "norm_layer", "with_cp", "out_indices"):
        config.pop(name, None)
    model = FlashInternImage(**config)
    if "logits" not in golden:
        model.prune_intermediate_layers(4)
    state_dict = {
        name.removeprefix("sd."): torch.from_numpy(array)
        for name, array in golden.items()
        if name.startswith("sd.")
    }
    assert list(model.state_dict()) == list(state_dict)
    model.load_state_dict(state_dict, strict=True)
    return golden, model.eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
@torch.no_grad()
def test_output_equals_the_published_values(path, dtype, tolerance, assert_near):
    golden, model = load_golden(path)
    model, x = model.to(dtype), torch.from_numpy(golden["input"]).to(dtype)
    features, maps = model.forward_intermediates(x)
    actual = {f"feat{i}": feature_map for i, feature_map in enumerate(maps)}
    if "logits" in golden:
        actual["logits"] = model(x)
        actual["pooled"] = model.forward_head(features, pre_logits=True)
    for name, tensor in actual.items():
        assert_near(tensor, torch.from_numpy(golden[name]), tolerance)


@pytest.mark.parametrize(
    "path", [path for path in GOLDENS if path.stem.startswith("cls")], ids=lambda path: path.stem
)
def test_input_gradient_equals_the_published_one(path, assert_near):
    golden, model = load_golden(path)
    x = torch.from_numpy(golden["input"]).double().requires_grad_()
    grad_logits = torch.from_numpy(golden["grad_logits"]).double()
    (grad,) = torch.autograd.grad(model.double()(x), x, grad_logits)
    assert_near(grad, torch.from_numpy(golden["grad_input_float64_only"]), 1e-9)


# --- Published names, shapes and initialization -------------------------------------------------


def shapes(model: nn.Module) -> list[tuple[str, list[int]]]:
    return [(name, list(tensor.shape)) for name, tensor in model.state_dict().items()]


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("size", NAMES)
def test_classifier_has_the_published_names_shapes_and_counts(size):
    schema = read_json(f"schemas/cls_{size}.json")
    model = meta_model(NAMES[size])
    assert shapes(model) == list(schema["state_dict"].items())
    assert [name for name, _ in model.named_parameters()] == schema["parameter_names"]
    assert [name for name, _ in model.named_buffers()] == schema["buffer_names"]
    assert count(model) == schema["num_params"]
    model.reset_classifier(0)
    assert count(model) == schema["num_params_excluding_head"]


@pytest.mark.parametrize("size", NAMES)
def test_dense_backbone_has_the_published_names_shapes_and_counts(size):
    schema = read_json(f"schemas/dense_{size}.json")
    model = meta_model(NAMES[size], features_only=True, layer_scale=1.0).model
    assert shapes(model) == list(schema["state_dict"].items())
    assert [name for name, _ in model.named_parameters()] == schema["parameter_names"]
    assert count(model) == schema["num_params"]


@pytest.mark.parametrize("size", NAMES)
def test_drop_path_rises_as_published(size):
    schema = read_json(f"schemas/cls_{size}.json")
    rate = schema["constructor_kwargs"]["drop_path_rate"]
    model = meta_model(NAMES[size], drop_path_rate=rate)
    rates = [
        [getattr(block.drop_path, "drop_prob", 0.0) for block in stage.blocks]
        for stage in model.levels
    ]
    assert rates == schema["drop_path_per_block"]


@pytest.mark.slow
@pytest.mark.parametrize("size", NAMES)
def test_model_costs_the_published_macs(size):
    macs = read_json(f"schemas/cls_{size}.json")["macs"]
    model, resolution = meta_model(NAMES[size]), macs["image_size"]
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, resolution, resolution, device="meta"))
    flops = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    assert flops.pop("ops_dcnv4.dcnv4") == 2 * macs["dcnv4_core_macs"]
    assert sum(flops.values()) == 2 * (macs["conv_macs"] + macs["linear_macs"])


@pytest.mark.parametrize("style", "TL")
def test_initialization_is_distributed_as_published(style):
    golden = read_json(f"schemas/init_stats_{style}_style.json")
    torch.manual_seed(0)
    model = FlashInternImage(**golden["config"])
    assert shapes(model) == [(name, stats["shape"]) for name, stats in golden["tensors"].items()]
    for name, tensor in model.state_dict().items():
        assert_same_distribution(name, tensor.double(), golden["tensors"][name])


def assert_same_distribution(name: str, tensor: Tensor, stats: dict) -> None:
    """Compare a tensor with the statistics of another sample of the same size."""
    if stats["min"] == stats["max"]:
        assert tensor.eq(stats["min"]).all(), name
        return
    size, deviation = tensor.numel(), stats["std"]
    assert abs(tensor.mean() - stats["mean"]) < 6 * deviation / math.sqrt(size), name
    assert abs(tensor.std() - deviation) < 5 * deviation / math.sqrt(size), name
    is_uniform = stats["max"] < 2 * deviation
    if is_uniform:
        assert tensor.min().item() == pytest.approx(stats["min"], rel=15 / size), name
        assert tensor.max().item() == pytest.approx(stats["max"], rel=15 / size), name
    else:
        assert min(-tensor.min(), tensor.max()) > 2 * deviation, name


def test_fine_groups_give_the_published_layer_decay():
    model = meta_model(NAMES["L"])
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    last = max(layers.values())
    published = {name: lr for name, lr, *_ in read_json("optim/cls_L_recipe.json")["groups"]}
    actual = {
        name: 0.9 ** (last - layer) * (0.1 if "offset" in name else 1)
        for name, layer in layers.items()
    }
    assert actual == pytest.approx(published)


@pytest.mark.parametrize("size", "TL")
def test_weight_decay_excludes_the_published_parameters(size):
    model = meta_model(NAMES[size])
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = param_groups_weight_decay(
        model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay()
    )
    actual = {names[p]: group["weight_decay"] for group in groups for p in group["params"]}
    recipe = read_json(f"optim/cls_{size}_recipe.json")["groups"]
    assert actual == {name: weight_decay for name, _, weight_decay, _ in recipe}


def test_coarse_groups_are_the_stem_stages_and_head():
    model = small_model()
    groups = group_parameters(model, model.group_matcher(coarse=True))
    prefixes = [{".".join(name.split(".")[:2]) for name in names} for names in groups.values()]
    assert all(name.startswith("patch_embed") for name in prefixes[0])
    assert prefixes[1:5] == [{f"levels.{i}"} for i in range(4)]
    assert prefixes[5:] == [{"conv_head.0", "conv_head.1", "head.weight", "head.bias"}]


# --- timm's registry ----------------------------------------------------------------------------


def test_timm_lists_the_models():
    assert timm.list_models("flash_internimage*", include_tags=True) == CONFIGURED
    assert timm.list_pretrained("flash_internimage*") == RELEASED


@pytest.mark.parametrize("name", CONFIGURED)
def test_pretrained_config_describes_the_model(name):
    model = meta_model(name)
    config = model.pretrained_cfg
    classifier = model.get_submodule(config["classifier"])
    assert classifier is model.get_classifier()
    assert classifier.out_features == model.num_classes == config["num_classes"]
    first_conv = model.get_submodule(config["first_conv"])
    assert first_conv.in_channels == config["input_size"][0]
    features = model.forward_features(torch.empty(1, *config["input_size"], device="meta"))
    assert features.shape == (1, model.num_features, *config["pool_size"])


@pytest.mark.parametrize(("name", "size"), [("nano", 64), ("tiny", 224), ("large", 384)])
def test_evaluation_resizes_the_whole_image_bicubically(name, size):
    config = resolve_model_data_config(meta_model(f"flash_internimage_{name}"))
    assert config["input_size"] == (3, size, size)
    assert (config["crop_pct"], config["interpolation"]) == (1.0, "bicubic")
    assert config["mean"] == (0.485, 0.456, 0.406)


# --- Classifier ---------------------------------------------------------------------------------


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_input_channels_and_classes_are_configurable(in_chans):
    model = timm.create_model("flash_internimage_nano", num_classes=7, in_chans=in_chans)
    assert model(images(2, in_chans, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize("size", [(97, 70), (33, 1)])
@STYLES
def test_any_image_size_works(style, size):
    maps = small_model(**style).forward_intermediates(images(1, 3, *size), intermediates_only=True)
    strides = (4, 8, 16, 32)
    assert [m.shape[2:] for m in maps] == [
        (math.ceil(size[0] / stride), math.ceil(size[1] / stride)) for stride in strides
    ]


def test_zero_classes_give_pooled_features():
    model, x = small_model(num_classes=0), images(2, 3, 64, 64)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(x).shape == (2, model.head_hidden_size)
    assert model(x).equal(model.forward_head(model.forward_features(x), pre_logits=True))


def test_disabled_pooling_gives_a_feature_map():
    model = small_model(num_classes=0, global_pool="")
    assert model(images(2, 3, 64, 96)).shape == (2, model.head_hidden_size, 2, 3)


def test_forward_is_forward_features_then_forward_head():
    model, x = small_model(), images(2, 3, 64, 64)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 2, 2)
    assert model.forward_head(features).equal(model(x))
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    assert model.get_classifier()(pooled).equal(model(x))


@pytest.mark.parametrize("global_pool", [None, "avg", "max", "avgmax", "catavgmax"])
def test_reset_classifier_changes_classes_and_pooling(global_pool):
    model, x = small_model(), images(2, 3, 64, 64)
    model.reset_classifier(5, global_pool)
    assert model.num_classes == model.get_classifier().out_features == 5
    assert model(x).shape == (2, 5)


def test_reset_classifier_applies_the_requested_pooling():
    model, x = small_model(num_classes=0), images(2, 3, 64, 64)
    feature_map = model.conv_head(model.forward_features(x))
    model.reset_classifier(0, "max")
    torch.testing.assert_close(model(x), feature_map.amax((2, 3)))
    model.reset_classifier(0, "avg")
    torch.testing.assert_close(model(x), feature_map.mean((2, 3)))
    model.reset_classifier(0, "")
    assert model(x).equal(feature_map)


def test_reset_classifier_keeps_dtype_and_published_initialization():
    model = small_model().double()
    model.reset_classifier(1000)
    assert model.head.weight.dtype == torch.float64
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.head.bias.any()


def test_reset_classifier_removes_the_old_weights():
    model = small_model()
    model.reset_classifier(0)
    assert not any(name.startswith("head.") for name in model.state_dict())


def test_groups_must_match_depths():
    with pytest.raises(ValueError, match=r"groups must have one entry per stage \(4\)"):
        FlashInternImage(groups=(4, 8, 16))


# --- Feature maps -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("out_indices", "stages"),
    [
        (None, [0, 1, 2, 3]),
        ((0, 1, 2, 3), [0, 1, 2, 3]),
        ((1, 3), [1, 3]),
        ((0,), [0]),
        ((-2, -1), [2, 3]),
        ((-3,), [1]),
    ],
)
def test_features_only_matches_feature_info(out_indices, stages):
    kwargs = {} if out_indices is None else {"out_indices": out_indices}
    model = timm.create_model("flash_internimage_nano", features_only=True, **kwargs)
    assert model.feature_info.channels() == [32 * 2**stage for stage in stages]
    assert model.feature_info.reduction() == [4 * 2**stage for stage in stages]
    assert model.feature_info.module_name() == [f"feature_maps.{stage}" for stage in stages]
    maps = model(images(2, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [
        (2, channels, 64 // reduction, 96 // reduction)
        for channels, reduction in zip(
            model.feature_info.channels(), model.feature_info.reduction(), strict=True
        )
    ]


@STYLES
def test_intermediates_are_the_outputs_of_the_stages(style):
    model, x = small_model(**style), images(2, 3, 64, 64)
    outputs = []
    for stage in model.levels:
        stage.register_forward_hook(lambda module, args, output: outputs.append(output))
    features, maps = model.forward_intermediates(x)
    assert all(m.equal(out.permute(0, 3, 1, 2)) for m, out in zip(maps, outputs, strict=True))
    assert maps[-1].equal(features)
    assert features.equal(model.forward_features(x))


def test_intermediates_of_selected_stages():
    model, x = small_model(), images(1, 3, 64, 64)
    _, maps = model.forward_intermediates(x)
    for indices, stages in [(2, [2, 3]), ([0, 2], [0, 2]), ([-1], [3]), ((1,), [1])]:
        chosen = model.forward_intermediates(x, indices=indices, intermediates_only=True)
        assert len(chosen) == len(stages)
        assert all(m.equal(maps[stage]) for m, stage in zip(chosen, stages, strict=True))


def test_intermediates_stop_early():
    model, x = small_model(), images(1, 3, 64, 64)
    _, maps = model.forward_intermediates(x)
    model.levels[1].downsample = model.levels[2] = nn.Module()  # fails when called
    features, chosen = model.forward_intermediates(x, indices=[0, 1], stop_early=True)
    assert all(m.equal(expected) for m, expected in zip(chosen, maps[:2], strict=True))
    assert features.equal(maps[1])


def test_intermediates_channels_last():
    model, x = small_model(), images(1, 3, 64, 96)
    first = model.forward_intermediates(x, intermediates_only=True)
    last = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    assert [m.shape[1:] for m in last] == [(16, 24, 16), (8, 12, 32), (4, 6, 64), (2, 3, 128)]
    assert all(a.permute(0, 2, 3, 1).equal(b) for a, b in zip(first, last, strict=True))


@pytest.mark.parametrize("output_fmt", ["NLC", "nchw", ""])
def test_unsupported_formats_of_intermediates_are_rejected(output_fmt):
    with pytest.raises(ValueError, match=f"'NCHW' or 'NHWC', got '{output_fmt}'"):
        small_model().forward_intermediates(images(1, 3, 64, 64), output_fmt=output_fmt)


@pytest.mark.parametrize(("indices", "kept"), [([0, 1], [0, 1]), ([-3], [1]), (1, [3])])
def test_pruned_model_gives_the_same_feature_maps(indices, kept):
    model, x = small_model(), images(1, 3, 64, 64)
    expected = model.forward_intermediates(x, indices=indices, intermediates_only=True)
    assert model.prune_intermediate_layers(indices) == kept
    actual = model.forward_intermediates(x, indices=kept, intermediates_only=True)
    assert all(a.equal(e) for a, e in zip(actual, expected, strict=True))
    assert model.num_features == expected[-1].shape[1]
    assert model(x).equal(expected[-1])
    unused = (f"levels.{kept[-1] + 1}", f"levels.{kept[-1]}.downsample", "conv_head", "head")
    assert not any(name.startswith(unused) for name in model.state_dict())


def test_pruning_may_keep_the_head():
    model, x = small_model(), images(1, 3, 64, 64)
    logits = model(x)
    assert model.prune_intermediate_layers([1, 3], prune_head=False) == [1, 3]
    assert model(x).equal(logits)


def test_pruned_model_keeps_only_the_layers_of_its_stages():
    model = timm.create_model("flash_internimage_nano")
    whole = group_parameters(model, model.group_matcher(), reverse=True)
    model.prune_intermediate_layers([2])
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert max(layers.values()) == layers["levels.2.blocks.1.dcn.value_proj.weight"] == 3
    kept = [name for name in layers if "blocks" in name]
    assert {name: layers[name] for name in kept} == {name: whole[name] for name in kept}


def test_pruned_model_can_be_pruned_again():
    model = small_model()
    model.prune_intermediate_layers([0, 2])
    assert model.prune_intermediate_layers([0]) == [0]
    assert model(images(1, 3, 64, 64)).shape == (1, 16, 16, 16)


def test_pruned_model_accepts_a_new_classifier():
    model = small_model()
    model.prune_intermediate_layers([0, 1])
    model.reset_classifier(5, "avg")
    assert model(images(2, 3, 64, 64)).shape == (2, 5)


# --- Training -----------------------------------------------------------------------------------


@STYLES
def test_every_parameter_gets_a_gradient(style):
    grads = gradients(small_model(**style), images(2, 3, 64, 64))
    assert [name for name, grad in grads.items() if not grad.any()] == []


@STYLES
def test_fresh_model_has_finite_gradients(style):
    grads = gradients(FlashInternImage(**SMALL, **style), images(2, 3, 64, 64))
    assert all(grad.isfinite().all() for grad in grads.values())


def test_gradient_checkpointing_recomputes_blocks():
    model, x = small_model(drop_path_rate=0.5).train(), images(4, 3, 64, 64)
    calls = []
    for stage in model.levels:
        stage.blocks[0].register_forward_pre_hook(lambda *_: calls.append(None))
    torch.manual_seed(0)
    expected = gradients(model, x)
    assert len(calls) == 4
    model.set_grad_checkpointing()
    torch.manual_seed(0)
    actual = gradients(model, x)
    assert len(calls) == 4 + 8
    assert all(actual[name].equal(expected[name]) for name in expected)
    model.set_grad_checkpointing(False)
    gradients(model, x)
    assert len(calls) == 12 + 4


@pytest.mark.parametrize("regularization", ["drop_path_rate", "drop_rate"])
def test_regularization_applies_only_in_training(regularization):
    plain, model = small_model(), small_model(**{regularization: 0.5})
    x = images(4, 3, 64, 64)
    assert model(x).equal(plain(x))
    first, second = plain.train()(x), plain(x)
    assert first.equal(second)
    first, second = model.train()(x), model(x)
    assert not first.equal(second)


# --- Deployment ---------------------------------------------------------------------------------


@STYLES
def test_image_in_a_batch_equals_the_image_alone(style):
    model, batch = small_model(**style).double(), images(3, 3, 97, 70).double()
    alone = torch.cat([model(image[None]) for image in batch])
    torch.testing.assert_close(model(batch), alone, rtol=1e-12, atol=1e-12)


def test_deep_copy_is_independent():
    model, x = small_model(), images(1, 3, 64, 64)
    expected, twin = model(x), copy.deepcopy(model)
    assert twin(x).equal(expected)
    nn.init.zeros_(twin.head.weight)
    assert model(x).equal(expected)


def test_memory_format_of_the_input_does_not_matter():
    model, x = small_model(), images(2, 3, 64, 64)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), model(x))


@pytest.mark.slow
def test_export_with_dynamic_batch_and_size():
    model = small_model(depths=(1,), groups=(1,))
    dynamic = torch.export.Dim.AUTO
    program = torch.export.export(
        model,
        (images(2, 3, 32, 32),),
        dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},),
        strict=False,
    )
    x, expected = images(3, 3, 48, 40), model(images(3, 3, 48, 40))
    torch.testing.assert_close(program.module()(x), expected)
    plain = program.run_decompositions(decompositions.table())
    operators = [node.target for node in plain.graph.nodes if isinstance(node.target, OpOverload)]
    assert {operator.namespace for operator in operators} == {"aten"}
    assert not any(operator._schema.is_mutable for operator in operators)
    torch.testing.assert_close(plain.module()(x), expected)


@pytest.mark.slow
def test_images_of_any_size_are_compiled_once_for_training_and_once_for_evaluation():
    eager = small_model(depths=(1,), groups=(1,))
    counter, twin = CompileCounter(), copy.deepcopy(eager)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, dynamic=True, backend=counter)
    for training, graphs in ((True, 1), (False, 2)):
        for model in (eager, compiled):
            model.train(training)
        for size in ((2, 3, 32, 48), (3, 3, 64, 40), (4, 3, 37, 50)):
            actual, expected = compiled(images(*size)), eager(images(*size))
            torch.testing.assert_close(actual, expected)
            actual.square().sum().backward()
            expected.square().sum().backward()
        assert counter.frame_count == graphs
    for a, e in zip(twin.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, e.grad)


@pytest.mark.slow
def test_compiled_model_equals_the_eager_one(assert_near):
    model = small_model(depths=(1,), groups=(1,)).double()
    x = images(2, 3, 32, 32).double()
    # Scalar code in one C++ file per graph compiles three times as fast.
    quick = {
        "cpp_wrapper": True,
        "cpp.vec_isa_ok": False,
        "cpp_cache_precompile_headers": False,
    }
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, options=quick)
    assert_near(compiled.train()(x), model.train()(x), 1e-12)
    actual, expected = gradients(compiled, x), gradients(model, x)
    for name in expected:
        torch.testing.assert_close(actual[f"_orig_mod.{name}"], expected[name])
