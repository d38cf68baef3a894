"""Tests of the FlashDeformAttn layer."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch._dynamo.testing import CompileCounter

from ops_dcnv4 import FlashDeformAttn, ms_deform_attn

GOLDEN = Path(__file__).parents[1] / "data" / "module" / "flash_deform_attn_ref2d.npz"
LEVELS = ((6, 8), (3, 4), (2, 2))
PIXELS = sum(height * width for height, width in LEVELS)


def randomized_layer(**options) -> FlashDeformAttn:
    """Return a layer with random weights; the initial ones treat all queries alike."""
    torch.manual_seed(0)
    layer = FlashDeformAttn(**{"d_model": 32, "n_levels": 3, "n_heads": 4, "n_points": 2} | options)
    torch.nn.init.normal_(layer.sampling_offsets.weight, std=0.2)
    torch.nn.init.normal_(layer.attention_weights.weight, std=0.2)
    return layer.double()


def random_arguments(reference_size: int = 2, queries: int = 7) -> dict:
    torch.manual_seed(1)
    return {
        "query": torch.randn(2, queries, 32, dtype=torch.float64),
        "reference_points": torch.rand(2, queries, 3, reference_size, dtype=torch.float64),
        "input_flatten": torch.randn(2, PIXELS, 32, dtype=torch.float64),
        "input_spatial_shapes": torch.tensor(LEVELS),
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_published_layer(dtype, tolerance, assert_near):
    golden = np.load(GOLDEN)
    layer = FlashDeformAttn(**json.loads(str(golden["config_json"]))).to(dtype)
    state = {n.removeprefix("sd."): torch.from_numpy(golden[n]) for n in golden if "sd." in n}
    layer.load_state_dict(state)
    output = layer(
        *(torch.from_numpy(golden[name]).to(dtype) for name in ("query", "reference_points")),
        torch.from_numpy(golden["input_flatten"]).to(dtype),
        torch.from_numpy(golden["spatial_shapes"]),
        torch.from_numpy(golden["level_start_index"]),
    )
    assert_near(output, torch.from_numpy(golden["output_exact_locations"]), tolerance)


def locations_from_the_formula(layer, query, reference_points) -> torch.Tensor:
    """Compute the sampling locations per head and point, following the paper."""
    n, queries, _ = query.shape
    offsets = layer.sampling_offsets(query).view(n, queries, 4, 3, 2, 2)
    locations = torch.empty_like(offsets)
    for level, (height, width) in enumerate(LEVELS):
        for head in range(4):
            for point in range(2):
                offset = offsets[:, :, head, level, point]
                reference = reference_points[:, :, level]
                if reference.shape[-1] == 2:
                    step = offset / torch.tensor([width, height])
                else:
                    step = offset / 2 * reference[..., 2:] / 2
                locations[:, :, head, level, point] = reference[..., :2] + step
    return locations


@pytest.mark.parametrize("reference_size", [2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_layer_equals_the_formula_of_the_paper(reference_size, masked, assert_near):
    layer, arguments = randomized_layer(), random_arguments(reference_size)
    mask = torch.zeros(2, PIXELS, dtype=torch.bool)
    mask[0, 10:30] = masked
    query, reference_points, pixels, _ = arguments.values()
    value = layer.value_proj(pixels)
    value[mask] = 0
    weights = layer.attention_weights(query).view(2, 7, 4, 6).softmax(-1).view(2, 7, 4, 3, 2)
    locations = locations_from_the_formula(layer, query, reference_points)
    expected = layer.output_proj(
        ms_deform_attn(value.view(2, PIXELS, 4, 8), LEVELS, None, locations, weights)
    )
    actual = layer(**arguments, input_padding_mask=mask if masked else None)
    assert_near(actual, expected.detach(), 1e-12)


@pytest.mark.parametrize("shape", [(1, 7, 3, 2), (2, 7, 1, 4), (2, 1, 3, 4), (1, 1, 1, 2)], ids=str)
def test_reference_points_broadcast(shape):
    layer, arguments = randomized_layer(), random_arguments()
    points = torch.rand(shape, dtype=torch.float64)
    expected = layer(**arguments | {"reference_points": points.expand(2, 7, 3, -1)})
    actual = layer(**arguments | {"reference_points": points})
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_level_start_index_and_lists_of_shapes_are_equivalent():
    layer, arguments = randomized_layer(), random_arguments()
    expected = layer(**arguments)
    start = torch.tensor([0, 48, 60])
    actual = layer(**arguments | {"input_spatial_shapes": LEVELS}, input_level_start_index=start)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


class LayerOnMaps(torch.nn.Module):
    """Apply the layer to two feature maps, passing their sizes in a list."""

    def __init__(self):
        super().__init__()
        self.layer = randomized_layer(n_levels=2)

    def forward(self, query, reference_points, large, small):
        pixels = torch.cat([m.flatten(2).transpose(1, 2) for m in (large, small)], dim=1)
        return self.layer(query, reference_points, pixels, [m.shape[2:] for m in (large, small)])


def maps_and_queries(n: int, queries: int, height: int, width: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(2)
    shapes = (n, queries, 32), (n, queries, 2, 2), (n, 32, height, width), (n, 32, 2, 3)
    return tuple(torch.rand(shape, dtype=torch.float64) for shape in shapes)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_dynamic_batch_queries_and_maps(strict):
    n, queries = torch.export.dims("n", "queries")
    sizes = dict(enumerate(torch.export.dims("h", "w"), start=2))
    dynamic = ({0: n, 1: queries}, {0: n, 1: queries}, {0: n} | sizes, {0: n})
    module = LayerOnMaps()
    program = torch.export.export(
        module, maps_and_queries(2, 5, 4, 6), dynamic_shapes=dynamic, strict=strict
    )
    others = maps_and_queries(3, 8, 7, 5)
    torch.testing.assert_close(program.module()(*others), module(*others))


def test_feature_maps_of_any_size_are_compiled_once():
    module = LayerOnMaps()
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for sizes in ((5, 9, 4, 6), (7, 8, 11, 10)):
        arguments = maps_and_queries(*sizes)
        torch.testing.assert_close(compiled(*arguments), module(*arguments))
    assert counter.frame_count == 1


def test_initialization_equals_that_of_deformable_detr():
    layer = FlashDeformAttn(d_model=64, n_levels=2, n_heads=8, n_points=3)
    assert not layer.sampling_offsets.weight.any()
    offsets = layer.sampling_offsets.bias.detach().view(8, 2, 3, 2)
    for head in range(8):
        angle = 2 * math.pi * head / 8
        direction = torch.tensor([math.cos(angle), math.sin(angle)])
        direction /= direction.abs().max()
        for point in range(3):
            expected = ((point + 1) * direction).expand(2, 2)
            torch.testing.assert_close(offsets[head, :, point], expected, atol=1e-5, rtol=0)
    assert not layer.attention_weights.weight.any()
    assert not layer.attention_weights.bias.any()
    bound = math.sqrt(6 / 128)
    for projection in (layer.value_proj, layer.output_proj):
        assert not projection.bias.any()
        assert projection.weight.abs().max() <= bound
        assert projection.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_state_dict_has_the_published_keys():
    layers = "sampling_offsets", "attention_weights", "value_proj", "output_proj"
    expected = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    assert list(FlashDeformAttn().state_dict()) == expected
    assert FlashDeformAttn().sampling_offsets.weight.shape == (256, 256)


def test_sampling_locations_are_not_rounded_under_autocast(monkeypatch):
    layer = randomized_layer(n_levels=1).float()
    torch.nn.init.zeros_(layer.sampling_offsets.weight)
    seen = []
    monkeypatch.setattr(
        "ops_dcnv4.modules.flash_deform_attn.flash_deform_attn",
        lambda value, shapes, start, packed, points: seen.append(packed) or value.flatten(2)[:, :7],
    )
    reference_points = torch.rand(2, 7, 1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(2, 7, 32), reference_points, torch.randn(2, 152 * 9, 32), [(9, 152)])
    (packed,) = seen
    assert packed.dtype == torch.float32
    offsets = layer.sampling_offsets.bias.detach().bfloat16().float().view(4, 2, 2)
    exact = reference_points.double()[:, :, None] + offsets / torch.tensor([152.0, 9])
    locations = packed[..., :4].unflatten(-1, (2, 2))
    assert (locations - exact).abs().max() * 152 < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trains_under_autocast(dtype):
    layer, arguments = randomized_layer().float(), random_arguments()
    arguments = {k: v.float() if v.is_floating_point() else v for k, v in arguments.items()}
    with torch.autocast("cpu", dtype):
        output = layer(**arguments)
    assert output.dtype == dtype
    output.float().square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_heads": 5}, "n_heads must be positive and divide d_model=256, got 5"),
        ({"n_heads": 0}, "n_heads must be positive"),
        ({"n_levels": 0}, "n_levels must be at least 1, got 0"),
        ({"n_points": 0}, "n_points must be at least 1, got 0"),
    ],
)
def test_error_names_the_wrong_option(options, message):
    with pytest.raises(ValueError, match=message):
        FlashDeformAttn(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 7, 31)}, r"query must be \(N, length, 32\)"),
        ({"input_flatten": torch.zeros(PIXELS, 32)}, r"input_flatten must be \(N, length, 32\)"),
        ({"reference_points": torch.zeros(2, 7, 3, 3)}, r"reference_points must be \(2, 7, 3, 2\)"),
        ({"reference_points": torch.zeros(2, 7, 2, 2)}, r"reference_points must be \(2, 7, 3, 2\)"),
        ({"reference_points": torch.zeros(7, 3, 2)}, r"reference_points must be \(2, 7, 3, 2\)"),
        ({"input_spatial_shapes": [(6, 8), (3, 4)]}, "spatial_shapes"),
        ({"input_spatial_shapes": [(6, 8), (3, 4), (2, 3)]}, "spatial_shapes must have as many"),
        ({"input_level_start_index": [0, 1, 2]}, "level_start_index must be"),
        ({"input_padding_mask": torch.zeros(2, 5).bool()}, "input_padding_mask must be"),
        (
            {"input_padding_mask": torch.zeros(2, PIXELS)},
            "must be .* of torch.bool",
        ),
        ({"query": torch.zeros(1, 7, 32)}, "query and input_flatten must have one batch size"),
    ],
)
def test_error_names_the_wrong_argument(change, message):
    with pytest.raises(ValueError, match=message):
        randomized_layer()(**random_arguments() | change)
