"""Tests of the reference as a decomposition of the operators in exported and traced graphs."""

import pytest
import torch
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._ops import OpOverload

from ops_dcnv4 import DCNv4, DCNv4Conv2d, FlashDeformAttn, dcnv4, decompositions, reference
from ops_dcnv4.registration import SCHEMAS
from tests.ops_dcnv4.attention_cases import FORMS, Inputs, call, random_inputs
from tests.ops_dcnv4.cases import VARIED, random_tensors

TABLE = decompositions.table()


def custom_operators(graph: torch.fx.Graph) -> list[str]:
    """Return the operators that are not PyTorch's, or that write to their inputs."""
    operators = [node.target for node in graph.nodes if isinstance(node.target, OpOverload)]
    assert operators
    return [str(t) for t in operators if t.namespace != "aten" or t._schema.is_mutable]


def test_the_table_has_all_operators():
    assert TABLE.keys() == {getattr(torch.ops.ops_dcnv4, name).default for name in SCHEMAS}


class Dcnv4Layer(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, value, offset_mask):
        return dcnv4(value, offset_mask, *self.p)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("p", "dtype"),
    [(p, torch.float32) for p in VARIED.values()]
    + [(VARIED["default"], dtype) for dtype in (torch.bfloat16, torch.float16)],
    ids=str,
)
def test_exported_operator_is_decomposed(p, dtype):
    inputs = random_tensors(p).to(dtype)[:2]
    program = torch.export.export(Dcnv4Layer(p), inputs).run_decompositions(TABLE)
    assert custom_operators(program.graph) == []
    expected = reference.dcnv4(*inputs, *p)
    torch.testing.assert_close(program.module()(*inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("channels", [16, 32])  # with and without padding channels
def test_inference_has_only_operators_and_dimensions_of_core_ml(channels):
    layer = DCNv4(channels, group=channels // 16)
    program = torch.export.export(layer, (torch.rand(1, 3, 4, channels),))
    nodes = program.run_decompositions(TABLE).graph.nodes
    operators = {str(node.target) for node in nodes}
    unknown = {"aten.__and__.Tensor", "aten.alias.default", "aten.where.ScalarOther"}
    assert "aten.logical_and.default" in operators
    assert not operators & unknown
    values = [node.meta["val"] for node in nodes if node.op == "call_function"]
    assert max(value.dim() for value in values if isinstance(value, Tensor)) == 5


def sampling_layer() -> FlashDeformAttn:
    torch.manual_seed(0)
    layer = FlashDeformAttn(16, n_levels=2, n_heads=4, n_points=2).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    return layer


@pytest.mark.slow
def test_exported_layers_of_dynamic_sizes_are_decomposed(assert_near):
    n, length = torch.export.dims("n", "length")
    queries, points, pixels = {0: n, 1: length}, {0: n, 1: length}, {0: n}
    sizes = dict(zip((0, 2, 3), torch.export.dims("n", "h", "w", min=4), strict=True))

    def tokens(n: int, length: int) -> tuple[Tensor, ...]:
        shapes = (n, length, 16), (n, length, 2, 2), (n, 20, 16)
        return *(torch.rand(s).double() for s in shapes), torch.tensor([(4, 4), (2, 2)])

    conv = DCNv4Conv2d(16, 8, 3, stride=2, padding=1).double()
    nn.init.normal_(conv.offset_mask.weight, std=0.5)
    for layer, example, other, dynamic in (
        (sampling_layer(), tokens(2, 5), tokens(3, 7), (queries, points, pixels, None)),
        (conv, (torch.rand(5, 16, 6, 7).double(),), (torch.rand(4, 16, 9, 8).double(),), (sizes,)),
    ):
        program = torch.export.export(layer, example, dynamic_shapes=dynamic)
        program = program.run_decompositions(TABLE)
        assert custom_operators(program.graph) == []
        assert_near(program.module()(*other), layer(*other).detach(), 1e-12)


def gradients(function, tensors) -> tuple[Tensor, ...]:
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    return torch.autograd.grad(function(*tensors).square().sum(), leaves)


def assert_training_graphs_are_decomposed(function, tensors, assert_near) -> None:
    graphs = []

    def compile_graph(module, inputs):
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    compiled = aot_function(function, compile_graph, compile_graph, decompositions=TABLE)
    tensors = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    actual, expected = (gradients(f, tensors) for f in (compiled, function))
    assert len(graphs) == 2
    assert [custom_operators(graph) for graph in graphs] == [[], []]
    for a, e in zip(actual, expected, strict=True):
        assert_near(a, e, 1e-12)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("p", VARIED.values(), ids=VARIED)
def test_training_graphs_of_dcnv4_are_decomposed(p, assert_near):
    tensors = random_tensors(p)[:2]
    assert_training_graphs_are_decomposed(lambda *t: dcnv4(*t, *p).exp(), tensors, assert_near)


@pytest.mark.parametrize("form", FORMS)
def test_training_graphs_of_attention_are_decomposed(form, assert_near):
    def function(*tensors: Tensor) -> Tensor:
        return call(Inputs(*tensors, None), form).exp()

    assert_training_graphs_are_decomposed(function, random_inputs()[:5], assert_near)
