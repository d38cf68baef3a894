"""Compare patched models of Hugging Face transformers with the originals."""

import copy
import pickle
import types

import pytest
import torch
from torch import Tensor, nn

from ops_dcnv4 import integrations
from ops_dcnv4.integrations import attention, patch, unpatch

transformers = pytest.importorskip("transformers")

from tests.ops_dcnv4.transformers_models import (  # noqa: E402  needs transformers
    MODELS,
    build,
    d_fine,
    random_inputs,
    rt_detr_v2,
)

# Models whose layers are patched in different ways: a layer's forward, a global function that the
# forward calls, and a function in an attribute.
KINDS = ("deformable_detr", "mask2former", "d_fine")


@pytest.fixture
def calls(monkeypatch) -> list[None]:
    """A list with an element for each call of the operator."""
    calls, operator = [], attention.ms_deform_attn

    def counted(*inputs):
        calls.append(None)
        return operator(*inputs)

    monkeypatch.setattr(attention, "ms_deform_attn", counted)
    return calls


def run(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[dict, dict]:
    """Return the floating-point outputs of a model, and the gradients of all parameters."""
    outputs = {
        name: output.nan_to_num(neginf=0)  # the logits of missing words
        for name, output in model(**inputs).items()
        if isinstance(output, Tensor) and output.is_floating_point()
    }
    model.zero_grad()
    sum(o.square().mean() for o in outputs.values() if o.requires_grad).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: o.detach() for n, o in outputs.items()}, grads


def assert_all_near(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float):
    """Assert a maximum difference, relative to the largest number of all tensors."""
    assert actual.keys() == expected.keys()
    largest = max(1, *(tensor.abs().max() for tensor in expected.values()))
    for name in expected:
        difference = (actual[name] - expected[name]).abs().max()
        assert difference <= tolerance * largest, name


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["float", "double"]
)
@pytest.mark.parametrize("name", MODELS)
def test_patched_model_equals_the_original(name, dtype, tolerance, calls):
    model, inputs = build(name).to(dtype), random_inputs(name, dtype)
    layers = [type(layer) for layer in model.modules()]
    keys = list(model.state_dict())
    outputs, grads = run(model, inputs)
    assert not calls
    largest = max(grad.abs().max() for grad in grads.values())
    offsets = [grad for n, grad in grads.items() if n.endswith("sampling_offsets.weight")]
    assert all(grad.abs().max() > 1e-7 * largest for grad in offsets)  # the attention matters

    report = patch(model)
    patched_outputs, patched_grads = run(model, inputs)
    assert len(report.patched) == len(calls) == len(offsets) == MODELS[name][1]
    assert not report.skipped
    assert list(model.state_dict()) == keys
    assert_all_near(patched_outputs, outputs, tolerance)
    assert_all_near(patched_grads, grads, tolerance)

    assert unpatch(model) == tuple(report.patched)
    restored_outputs, restored_grads = run(model, inputs)
    assert [type(layer) for layer in model.modules()] == layers
    assert all(torch.equal(restored_outputs[n], outputs[n]) for n in outputs)
    assert all(torch.equal(restored_grads[n], grads[n]) for n in grads)


def test_patching_twice_changes_nothing():
    model = build("deformable_detr")
    first, layers = patch(model), [type(layer) for layer in model.modules()]
    assert patch(model) == first
    assert [type(layer) for layer in model.modules()] == layers
    assert len(unpatch(model)) == 3
    assert unpatch(model) == ()


def attention_layer(name: str) -> tuple[nn.Module, dict]:
    """Return a layer of a model that computes deformable attention, and its inputs."""
    model, recorded = build(name), []
    layer = next(m for m in model.modules() if type(m).__name__.endswith("DeformableAttention"))
    layer.register_forward_pre_hook(
        lambda _, args, kwargs: recorded.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        model(**random_inputs(name, torch.float32))
    layer._forward_pre_hooks.clear()
    return layer, recorded[0]


@pytest.mark.parametrize("name", KINDS)
def test_copies_of_a_patched_layer(name, calls):
    layer, (args, kwargs) = attention_layer(name)
    state = copy.deepcopy(layer.state_dict())
    patch(layer)
    layer.load_state_dict(state)
    with torch.no_grad():
        expected, _ = layer(*args, **kwargs)
        for duplicate in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            calls.clear()
            assert torch.equal(duplicate(*args, **kwargs)[0], expected)
            assert len(calls) == 1
            assert unpatch(duplicate)
            duplicate(*args, **kwargs)
            assert len(calls) == 1
        layer(*args, **kwargs)
        assert len(calls) == 2


@pytest.mark.parametrize("name", [*KINDS, "rt_detr_v2", "oneformer"])
def test_compiled_layer_calls_the_operator(name):
    layer, (args, kwargs) = attention_layer(name)
    patch(layer)
    graphs = []

    def backend(graph, _):
        graphs.append(str(graph.graph))
        return graph

    with torch.no_grad():
        expected = layer(*args, **kwargs)
        torch._dynamo.reset()
        actual = torch.compile(layer, fullgraph=True, backend=backend)(*args, **kwargs)
    assert len(graphs) == 1
    assert graphs[0].count("ops_dcnv4.ms_deform_attn") == 1
    assert "grid_sample" not in graphs[0]
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Linear(2, 2), "got none in Linear"),
        (rt_detr_v2(decoder_method="discrete"), "sampling method must be 'default'.*'discrete'"),
        (d_fine(decoder_method="discrete"), "sampling method must be 'default'.*'discrete'"),
    ],
)
def test_models_that_cannot_be_patched(model, reason):
    before = [type(layer) for layer in model.modules()]
    with pytest.raises(ValueError, match=reason):
        patch(model)
    assert [type(layer) for layer in model.modules()] == before


def test_model_must_be_a_module():
    for function in (patch, unpatch):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
            function({})


def test_layer_whose_forward_was_replaced_is_skipped():
    model = build("deformable_detr")
    layer = model.model.decoder.layers[1].encoder_attn.attn
    layer.forward = types.MethodType(type(layer).forward, layer)
    with pytest.warns(UserWarning, match="left 1 layers unchanged: .*replaced its forward already"):
        report = patch(model)
    assert (len(report.patched), list(report.skipped)) == (
        2,
        ["model.decoder.layers.1.encoder_attn.attn"],
    )
    assert "patched 2 layers, skipped 1" in str(report)


def test_layer_of_another_transformers_is_refused(monkeypatch):
    layer, _ = attention_layer("deformable_detr")
    other = type("MultiScaleDeformableAttention", (nn.Module,), {"forward": lambda self, value: 0})
    other.__module__ = "transformers.models.other"
    layer.attn = other()
    with pytest.raises(ValueError, match="parameters of transformers 5, got self, value"):
        patch(layer)


def test_class_changed_after_patching_is_not_undone():
    layer, _ = attention_layer("mask2former")
    patch(layer)
    layer.__class__ = type("Wrapped", (type(layer),), {})
    with pytest.raises(ValueError, match=r"classes that patch gave its layers.*Wrapped"):
        unpatch(layer)


def test_other_sampling_methods_are_refused():
    tensors = torch.zeros(1, 4, 1, 1), [(2, 2)], torch.zeros(1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match=r"method must be 'default'.*got 'discrete'"):
        attention.multi_scale_deformable_attention_v2(*tensors, [1], "discrete")


def test_names_are_exported():
    assert set(integrations.__all__) == {"Report", "deform_conv2d", "patch", "unpatch"}
