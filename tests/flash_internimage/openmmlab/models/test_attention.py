"""Compare the registered operator, layer and hook with the originals of OpenMMLab."""

import copy
import itertools
import logging
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcv.ops import MultiScaleDeformableAttention
from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch
from mmdet.models.layers import DeformableDetrTransformerEncoder
from mmengine.registry import HOOKS, MODELS
from torch._dynamo.testing import CompileCounter
from torch._ops import OpOverload

from flash_internimage.openmmlab import (
    FlashAttentionHook,
    FlashMultiScaleDeformableAttention,
    use_flash_attention,
)
from ops_dcnv4 import decompositions, ms_deform_attn
from ops_dcnv4.integrations import attention, patch, unpatch

LEVELS = ((6, 8), (3, 4))
PIXELS, QUERIES = 60, 7
SIDES = st.integers(1, 7)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shapes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=4),
    points=st.integers(1, 5),
    heads=st.integers(1, 3),
    channels=st.sampled_from([1, 5, 16, 32]),
    seed=st.integers(0, 99),
)
def test_operator_equals_that_of_mmcv(shapes, points, heads, channels, seed, assert_near):
    torch.manual_seed(seed)
    pixels = sum(height * width for height, width in shapes)
    value = torch.randn(2, pixels, heads, channels, dtype=torch.float64)
    locations = 0.5 + torch.randn(2, QUERIES, heads, len(shapes), points, 2, dtype=torch.float64)
    weights = torch.randn(2, QUERIES, heads, len(shapes), points, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (value, locations, weights)]
    spatial_shapes = torch.tensor(shapes)
    expected = multi_scale_deformable_attn_pytorch(value, spatial_shapes, locations, weights)
    actual = ms_deform_attn(value, spatial_shapes, None, locations, weights)
    assert_near(actual, expected.detach(), 1e-11)
    grad_output = torch.randn_like(expected)
    grads = [torch.autograd.grad(output, leaves, grad_output) for output in (actual, expected)]
    for a, e in zip(*grads, strict=True):
        assert_near(a, e, 1e-10)


def mmcv_layer(**options) -> MultiScaleDeformableAttention:
    """Build a layer with random weights; initially, offsets do not depend on the queries."""
    torch.manual_seed(0)
    options = {"embed_dims": 32, "num_heads": 4, "num_levels": 2, "num_points": 3} | options
    layer = MultiScaleDeformableAttention(**options, dropout=0.0)
    torch.nn.init.normal_(layer.sampling_offsets.weight, std=0.2)
    torch.nn.init.normal_(layer.attention_weights.weight, std=0.2)
    return layer.double()


def random_arguments(batch_first: bool, reference_size: int = 2) -> dict:
    torch.manual_seed(1)

    def tokens(length: int):
        tensor = torch.randn(2, length, 32, dtype=torch.float64)
        return tensor if batch_first else tensor.transpose(0, 1)

    return {
        "query": tokens(QUERIES),
        "value": tokens(PIXELS),
        "reference_points": torch.rand(2, QUERIES, 2, reference_size, dtype=torch.float64),
        "spatial_shapes": torch.tensor(LEVELS),
        "level_start_index": torch.tensor([0, 48]),
    }


OPTIONAL = {
    "nothing else": lambda arguments: {},
    "identity": lambda arguments: {"identity": torch.randn_like(arguments["query"])},
    "query_pos": lambda arguments: {"query_pos": torch.randn_like(arguments["query"])},
    "mask": lambda arguments: {"key_padding_mask": torch.rand(2, PIXELS) < 0.3},
    "residual": lambda arguments: {"residual": torch.randn_like(arguments["query"])},
    "key and others": lambda arguments: {"key": arguments["query"], "attn_masks": None},
}


@pytest.mark.filterwarnings("ignore:.*residual.*is deprecated")
@pytest.mark.parametrize("optional", OPTIONAL.values(), ids=OPTIONAL)
@pytest.mark.parametrize("reference_size", [2, 4])
@pytest.mark.parametrize("batch_first", [False, True])
def test_layer_equals_that_of_mmcv(batch_first, reference_size, optional, assert_near):
    stock = mmcv_layer(batch_first=batch_first)
    ours = FlashMultiScaleDeformableAttention(
        embed_dims=32, num_heads=4, num_levels=2, num_points=3, batch_first=batch_first, dropout=0.0
    )
    ours.double().load_state_dict(stock.state_dict())
    arguments = random_arguments(batch_first, reference_size)
    arguments |= optional(arguments)
    outputs = []
    for layer in (ours, stock):
        output = layer(**arguments)
        output.square().sum().backward()
        outputs.append(output.detach())
    assert_near(*outputs, 1e-12)
    for actual, expected in zip(ours.parameters(), stock.parameters(), strict=True):
        assert_near(actual.grad, expected.grad, 1e-11)


def test_exported_layer_decomposes_into_operators_of_pytorch(assert_near):
    layer = mmcv_layer(batch_first=False)
    use_flash_attention(layer)
    arguments = random_arguments(batch_first=False)
    program = torch.export.export(layer, (), arguments)
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    assert torch.ops.ops_dcnv4.ms_deform_attn.default in targets
    program = program.run_decompositions(decompositions.table())
    operators = [n.target for n in program.graph.nodes if isinstance(n.target, OpOverload)]
    assert {operator.namespace for operator in operators} == {"aten"}
    assert not any(operator._schema.is_mutable for operator in operators)
    assert_near(program.module()(**arguments), layer(**arguments).detach(), 1e-12)


@pytest.mark.slow
def test_queries_and_levels_of_any_size_are_compiled_once(assert_near):
    layer = mmcv_layer(batch_first=True)
    use_flash_attention(layer)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    # PyTorch gives equal sizes of the first call one symbol: a batch of 2 would be as fixed as the
    # two coordinates, and compiled again for other batches.
    for n, queries, levels in ((5, 7, LEVELS), (2, 9, ((4, 5), (2, 3))), (3, 8, ((7, 1), (1, 5)))):
        pixels = sum(height * width for height, width in levels)
        query, value = (torch.randn(n, size, 32).double() for size in (queries, pixels))
        arguments = {
            "value": value.requires_grad_(),
            "reference_points": torch.rand(n, queries, 2, 2).double(),
            "spatial_shapes": torch.tensor(levels),
        }
        outputs = [function(query, **arguments) for function in (compiled, layer)]
        grads = [torch.autograd.grad(output.square().sum(), value)[0] for output in outputs]
        assert_near(outputs[0], outputs[1].detach(), 1e-12)
        assert_near(*grads, 1e-11)
        assert counter.frame_count == 1


@pytest.mark.parametrize("reference_size", [2, 4])
@pytest.mark.parametrize("batch_first", [False, True])
def test_reference_points_broadcast_as_in_mmcv(batch_first, reference_size, assert_near):
    stock = mmcv_layer(batch_first=batch_first)
    ours = copy.deepcopy(stock)
    use_flash_attention(ours)
    arguments = random_arguments(batch_first, reference_size)
    for n, queries, levels in itertools.product((1, 2), (1, QUERIES), (1, 2)):
        points = arguments["reference_points"][:n, :queries, :levels].requires_grad_()
        outputs = [layer(**arguments | {"reference_points": points}) for layer in (ours, stock)]
        assert_near(*(output.detach() for output in outputs), 1e-12)
        actual, expected = (torch.autograd.grad(o.square().sum(), points)[0] for o in outputs)
        assert_near(actual, expected, 1e-11)


@pytest.mark.parametrize("shape", [(2, QUERIES, 3, 2), (2, 2, 2, 2), (QUERIES, 2, 2), (2, 7, 1, 3)])
def test_reference_points_that_do_not_broadcast_are_an_error(shape):
    layer = mmcv_layer(batch_first=True)
    use_flash_attention(layer)
    arguments = random_arguments(batch_first=True) | {"reference_points": torch.rand(shape)}
    with pytest.raises(ValueError, match=r"reference_points must be \(2, 7, 2, 2\)"):
        layer(**arguments)


def test_padding_mask_must_be_boolean():
    layer = mmcv_layer(batch_first=True)
    use_flash_attention(layer)
    with pytest.raises(ValueError, match="key_padding_mask must be a tensor of"):
        layer(**random_arguments(True), key_padding_mask=torch.zeros(2, PIXELS).byte())


def test_self_attention_and_projection_of_values(assert_near):
    stock = mmcv_layer(batch_first=True, value_proj_ratio=0.5)
    ours = copy.deepcopy(stock)
    assert use_flash_attention(ours) == 1
    arguments = random_arguments(batch_first=True)
    arguments |= {"query": arguments.pop("value")}
    arguments["reference_points"] = torch.rand(2, PIXELS, 2, 2, dtype=torch.float64)
    assert_near(ours(**arguments), stock(**arguments).detach(), 1e-12)


def test_it_is_registered():
    config = {"type": "FlashMultiScaleDeformableAttention", "embed_dims": 64, "num_levels": 3}
    layer, stock = MODELS.build(config), MultiScaleDeformableAttention(64, num_levels=3)
    assert type(layer) is FlashMultiScaleDeformableAttention
    shapes, expected = (
        {name: tensor.shape for name, tensor in module.state_dict().items()}
        for module in (layer, stock)
    )
    assert shapes == expected
    torch.testing.assert_close(layer.sampling_offsets.bias, stock.sampling_offsets.bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_runs_under_autocast_without_rounding_locations(dtype, monkeypatch):
    layer = mmcv_layer(batch_first=True)
    use_flash_attention(layer)
    seen = {}

    def recorded(value, shapes, start, locations, weights):
        seen.update(locations=locations.dtype, weights=weights.dtype)
        return ms_deform_attn(value, shapes, start, locations, weights)

    monkeypatch.setattr("flash_internimage.openmmlab.models.attention.ms_deform_attn", recorded)
    arguments = random_arguments(batch_first=True)
    expected = layer(**arguments)
    arguments = {k: v.float() if v.is_floating_point() else v for k, v in arguments.items()}
    with torch.autocast("cpu", dtype):
        output = layer.float()(**arguments)
    output.float().sum().backward()
    assert seen["locations"] == seen["weights"] == torch.float32
    assert (output.double() - expected).abs().max() < 0.05 * expected.abs().max()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_hook_switches_the_layers_of_a_detector(assert_near, caplog):
    config = {"self_attn_cfg": {"embed_dims": 32, "num_heads": 4, "num_levels": 2}}
    config["ffn_cfg"] = {"embed_dims": 32, "feedforward_channels": 64}
    torch.manual_seed(0)
    encoder = DeformableDetrTransformerEncoder(num_layers=2, layer_cfg=config).double().eval()
    arguments = {
        "query": torch.randn(2, PIXELS, 32, dtype=torch.float64),
        "query_pos": torch.randn(2, PIXELS, 32, dtype=torch.float64),
        "key_padding_mask": torch.rand(2, PIXELS) < 0.2,
        "spatial_shapes": torch.tensor(LEVELS),
        "level_start_index": torch.tensor([0, 48]),
        "valid_ratios": torch.ones(2, 2, 2, dtype=torch.float64),
    }
    expected = encoder(**arguments).detach()
    parameters = list(encoder.parameters())
    runner = types.SimpleNamespace(model=encoder, logger=logging.getLogger("mmengine"))
    with caplog.at_level(logging.INFO):
        HOOKS.build({"type": "FlashAttentionHook"}).before_run(runner)
        HOOKS.build({"type": "FlashAttentionHook"}).before_run(runner)
    assert [(r.levelname, r.message[:10]) for r in caplog.records] == [
        ("INFO", "switched 2"),
        ("WARNING", "switched 0"),
    ]
    assert isinstance(encoder.layers[1].self_attn, FlashMultiScaleDeformableAttention)
    assert isinstance(encoder.layers[1].self_attn, MultiScaleDeformableAttention)
    assert all(a is b for a, b in zip(encoder.parameters(), parameters, strict=True))
    assert_near(encoder(**arguments), expected, 1e-12)
    assert use_flash_attention(encoder) == 0
    assert FlashAttentionHook in HOOKS.module_dict.values()


@pytest.mark.parametrize("missing", ["reference_points", "spatial_shapes"])
def test_missing_argument_is_an_error(missing):
    layer = mmcv_layer()
    use_flash_attention(layer)
    with pytest.raises(ValueError, match=f"{missing} must be a tensor, got None"):
        layer(**random_arguments(batch_first=False) | {missing: None})


def test_parameters_have_the_given_device_and_dtype():
    layer = FlashMultiScaleDeformableAttention(32, num_heads=4, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float64)}
    layer = layer.to_empty(device="cpu")
    layer.init_weights()
    skipped = torch.nn.utils.skip_init(FlashMultiScaleDeformableAttention, 32, num_heads=4)
    skipped.init_weights()
    stock = MultiScaleDeformableAttention(32, num_heads=4).state_dict()
    for made, dtype in ((layer, torch.float64), (skipped, torch.float32)):
        assert {p.dtype for p in made.parameters()} == {dtype}
        torch.testing.assert_close(
            made.sampling_offsets.bias, stock["sampling_offsets.bias"].to(dtype)
        )
        assert not made.attention_weights.weight.any()


@pytest.mark.parametrize("reference_size", [2, 4])
def test_patched_layer_of_mmcv_equals_the_original(reference_size, monkeypatch, assert_near):
    layer = mmcv_layer(batch_first=True)
    arguments = random_arguments(True, reference_size)
    leaves = [arguments[name].requires_grad_() for name in ("query", "value")]
    leaves += layer.parameters()
    expected = layer(**arguments)
    expected_grads = torch.autograd.grad(expected.square().sum(), leaves)
    model = torch.nn.ModuleDict({"layer": layer})
    assert patch(model).patched == {"layer": "MultiScaleDeformableAttention"}

    calls = []
    monkeypatch.setattr(
        attention, "ms_deform_attn", lambda *a: calls.append(a) or ms_deform_attn(*a)
    )
    # Decorators of the forward stay: `residual` is the former name of `identity`.
    for changes in ({}, {"residual": arguments["query"]}):
        actual = layer(**arguments | changes)
        assert_near(actual, expected.detach(), 1e-11)
    grads = torch.autograd.grad(actual.square().sum(), leaves)
    for a, e in zip(grads, expected_grads, strict=True):
        assert_near(a, e, 1e-10)
    assert len(calls) == 2

    assert unpatch(model) == ("layer",)
    assert torch.equal(layer(**arguments), expected)
    assert type(layer) is MultiScaleDeformableAttention
    assert len(calls) == 2


def test_patched_layer_of_mmcv_calls_the_operator_on_gpus():
    """On GPUs, mmcv's layer calls `apply` of a class, which has no function for the CPU."""
    layer = mmcv_layer(batch_first=True)
    patch(layer)
    scope = type(layer).forward.__wrapped__.__globals__
    value = torch.randn(2, PIXELS, 4, 8)
    locations, weights = torch.rand(2, QUERIES, 4, 2, 3, 2), torch.rand(2, QUERIES, 4, 2, 3)
    levels = torch.tensor(LEVELS), torch.tensor([0, 48])
    output = scope["MultiScaleDeformableAttnFunction"].apply(value, *levels, locations, weights, 64)
    assert torch.equal(output, ms_deform_attn(value, *levels, locations, weights))
