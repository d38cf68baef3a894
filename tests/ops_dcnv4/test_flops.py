"""Tests of operation counts against manual counts and the multiply-adds of convolutions."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ops_dcnv4 import DCNv4, DCNv4Conv2d, FlashDeformAttn, dcnv4, flops
from tests.ops_dcnv4.attention_cases import FORMS, call, random_inputs


def count(function, *arguments) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("options", "output_size", "taps"),
    [
        ({}, (6, 8), 9),
        ({"stride": 2}, (3, 4), 9),
        ({"kernel_size": (3, 1), "padding": (1, 0), "remove_center": True}, (6, 8), 2),
    ],
)
def test_dcnv4_counts_five_multiply_adds_per_sample_and_channel(options, output_size, taps):
    value = torch.rand(2, 6, 8, 16, requires_grad=True)
    offset_mask = torch.rand(2, *output_size, 56, requires_grad=True)
    pixels = 2 * output_size[0] * output_size[1]
    expected = 2 * 5 * pixels * taps * 16
    assert count(lambda: dcnv4(value, offset_mask, groups=2, **options)) == expected
    output = dcnv4(value, offset_mask, groups=2, **options).sum()
    assert count(output.backward) == 2 * expected


@pytest.mark.parametrize("form", FORMS)
def test_attention_counts_five_multiply_adds_per_sample_and_channel(form):
    inputs = random_inputs(points=3, heads=2, head_channels=5, queries=6, batch=2)
    expected = 2 * 5 * (2 * 6 * 2 * (2 * 3)) * 5  # N, Lq, M, L * K, D
    value = inputs.value.requires_grad_()
    assert count(lambda: call(inputs._replace(value=value), form)) == expected
    output = call(inputs._replace(value=value), form).sum()
    assert count(output.backward) == 2 * expected


def linear(pixels: int, channels_in: int, channels_out: int) -> int:
    return pixels * channels_in * channels_out


def multiply_adds_of_operators(layer, arguments) -> int:
    """Count from a traced graph with the handles, as fvcore and mmengine do."""
    graph, _ = torch.jit._get_trace_graph(layer, arguments)
    counts = [
        flops.HANDLES[node.kind()](list(node.inputs()), list(node.outputs()))
        for node in graph.nodes()
        if node.kind().startswith("ops_dcnv4::")
    ]
    assert len(counts) == 1
    return counts[0]


# Layer, inputs, multiply-adds of the convolutions and linear layers, and those of the operator.
LAYERS = {
    "dcnv4": (
        lambda: DCNv4(32, group=2, stride=2, dw_kernel_size=3),
        lambda: (torch.rand(1, 6, 8, 32),),
        12 * 32 * 9 + linear(12, 32, 56) + linear(48, 32, 32) + linear(12, 32, 32),
        5 * 12 * 9 * 32,
    ),
    "conv2d": (
        lambda: DCNv4Conv2d(32, 8, 3, padding=1),
        lambda: (torch.rand(1, 32, 6, 8),),
        linear(48, 32, 56) + linear(48, 32, 32) + linear(48, 32, 8),
        5 * 48 * 9 * 32,
    ),
    "attention": (
        lambda: FlashDeformAttn(32, n_levels=2, n_heads=4, n_points=3),
        lambda: (
            torch.rand(1, 7, 32),
            torch.rand(1, 7, 2, 2),
            torch.rand(1, 20, 32),
            torch.tensor([(4, 4), (2, 2)]),
        ),
        linear(20, 32, 32) + linear(7, 32, 3 * 4 * 6) + linear(7, 32, 32),
        5 * 7 * 6 * 32,
    ),
}


@pytest.mark.parametrize(("make", "inputs", "others", "operator"), LAYERS.values(), ids=LAYERS)
def test_layers_are_counted_by_torch_and_by_handles(make, inputs, others, operator):
    layer, arguments = make().eval(), inputs()
    assert count(layer, *arguments) == 2 * (others + operator)
    assert multiply_adds_of_operators(layer, arguments) == operator
