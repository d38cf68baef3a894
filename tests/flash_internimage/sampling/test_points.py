"""Tests of sampling points against the operator, SciPy, autograd and computations by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from torch import Tensor

from flash_internimage.sampling import Preprocessing, sampling_points
from flash_internimage.sampling.layers import find_layer
from flash_internimage.sampling.points import (
    Mapping,
    Taps,
    Units,
    points_of_units,
    strongest,
    units_read,
)
from ops_dcnv4 import dcnv4
from ops_dcnv4.window import Window
from tests.flash_internimage.models import nano
from tests.ops_dcnv4.cases import VARIED, Parameters, random_tensors

AS_IT_IS = Preprocessing()

cases = pytest.mark.parametrize("parameters", VARIED.values(), ids=VARIED)


def units(*pixels: tuple[int, int]) -> Units:
    rows, columns = torch.tensor(pixels).T
    return Units(rows, columns, torch.ones(len(pixels), dtype=torch.float64))


def sample(channel: Tensor, taps: Taps) -> Tensor:
    """Interpolate a channel (H, W) bilinearly, with zeros outside, by SciPy."""
    points = np.stack((taps.y.numpy(), taps.x.numpy()))
    return torch.from_numpy(
        map_coordinates(channel.numpy(), points, order=1, mode="grid-constant", cval=0.0)
    )


# One layer


@cases
@pytest.mark.parametrize("spread", [1.0, 4.0], ids=["near", "far"])
def test_samples_at_the_points_add_up_to_the_output(parameters, spread):
    tensors = random_tensors(parameters, batch=1, spread=spread)
    output = dcnv4(tensors.value, tensors.offset_mask, *parameters)[0]
    pixels = [(r, c) for r in range(output.shape[0]) for c in range(output.shape[1])]
    taps = points_of_units(tensors.offset_mask, Window(*parameters), units(*pixels))
    channels = tensors.value[0].unflatten(-1, (parameters.groups, -1))
    for group, expected in enumerate(output.unflatten(-1, (parameters.groups, -1)).unbind(2)):
        own = taps.groups == group
        part = Taps(taps.x[own], taps.y[own], taps.weights[own], taps.groups[own])
        for channel in range(expected.shape[-1]):
            samples = part.weights * sample(channels[..., group, channel], part)
            total = samples.view(*expected.shape[:2], -1).sum(-1)
            torch.testing.assert_close(total, expected[..., channel], rtol=0, atol=1e-12)


@cases
def test_an_output_pixel_has_gradients_at_the_cells_of_its_points_only(parameters):
    tensors = random_tensors(parameters, batch=1)
    value = tensors.value.requires_grad_()
    output = dcnv4(value, tensors.offset_mask, *parameters)
    for row, column in [(0, 0), (output.shape[1] - 1, 1), (1, output.shape[2] - 1)]:
        [grad] = torch.autograd.grad(output[0, row, column].sum(), value, retain_graph=True)
        taps = points_of_units(tensors.offset_mask, Window(*parameters), units((row, column)))
        for group, own in enumerate(grad[0].chunk(parameters.groups, dim=-1)):
            chosen = taps.groups == group
            part = Taps(taps.x[chosen], taps.y[chosen], taps.weights[chosen], taps.groups[chosen])
            read = units_read(part, value.shape[1:3], groups=1)
            expected = torch.zeros(value.shape[1:3], dtype=torch.bool)
            expected[read.rows, read.columns] = True
            assert (own != 0).any(-1).equal(expected)


def test_a_layer_of_a_model_reads_the_cells_of_its_points(model, image):
    layer = find_layer(model, "levels.2.blocks.1")
    values = []
    hook = layer.dcn.value_proj.register_forward_hook(lambda *args: values.append(args[2]))
    layer.dcn.register_forward_hook(lambda *args: values.append(args[2]))
    model.forward_features(AS_IT_IS(image))
    hook.remove()
    value, output = values
    [grad] = torch.autograd.grad(output[0, 3, 4].sum(), value)
    [points] = sampling_points(
        model, image, "levels.2.blocks.1", (4 * 16, 3 * 16), preprocessing=AS_IT_IS
    )
    x, y = torch.from_numpy(points.positions / 16).T
    taps = Taps(x, y, torch.from_numpy(points.weights), torch.from_numpy(points.groups))
    read = units_read(taps, value.shape[1:3], layer.dcn.group)
    assert len(points.weights) == 8 * 9
    assert points.weights.min() < 0 < points.weights.max()
    found = (grad[0] != 0).any(-1).nonzero().tolist()
    assert found == torch.stack((read.rows, read.columns), 1).tolist()


# Several layers


@pytest.mark.parametrize("ratio", [1, 2])
def test_composed_points_reproduce_two_operators(ratio):
    upper = Parameters(groups=1, remove_center=True)
    lower = Parameters(groups=1, offset_scale=0.5)
    size = (6, 5)
    masks = []
    for p, side, seed in ((upper, size, 1), (lower, [ratio * n for n in size], 2)):
        mask = random_tensors(p, 1, side, group_channels=1, seed=seed).offset_mask
        mask[..., 2 * p.taps :].abs_()  # absolute weights are added where points meet
        masks.append(mask)
    value = random_tensors(lower, 1, [ratio * n for n in size], group_channels=1).value
    hidden = dcnv4(value, masks[1], *lower)[:, ::ratio, ::ratio]
    expected = dcnv4(hidden.contiguous(), masks[0], *upper)[0, 2, 3]

    taps = points_of_units(masks[0], Window(*upper), units((2, 3)))
    read = units_read(taps, size, 1, ratio)
    below = points_of_units(masks[1], Window(*lower), read)
    total = (below.weights * sample(value[0, ..., 0], below)).sum()
    torch.testing.assert_close(total, expected[0], rtol=0, atol=1e-12)


def test_equal_groups_weigh_as_much_as_one():
    taps = Taps(*torch.tensor([[1.5, 2.25], [0.0, 3.5], [2.0, -1.0], [0, 0]]).double())
    twice = Taps(*(torch.cat((field, field)) for field in (taps.x, taps.y, taps.weights, taps.x)))
    one, two = units_read(taps, (5, 5), groups=1), units_read(twice, (5, 5), groups=2)
    assert all(a.equal(b) for a, b in zip(vars(one).values(), vars(two).values(), strict=True))


def test_points_that_meet_add_their_absolute_weights():
    taps = Taps(*torch.tensor([[1.0, 1.0], [2.0, 2.5], [3.0, -4.0], [0, 0]]).double())
    read = units_read(taps, (4, 4), groups=1, ratio=2)
    found = torch.stack((read.rows, read.columns, read.weights), 1).tolist()
    assert found == [[4, 2, 3 + 2], [6, 2, 2]]


def test_a_regular_grid_is_composed_across_stages(regular, image):
    upper, lower = sampling_points(
        regular, image, "levels.2.blocks.0", (64, 32), 2, preprocessing=AS_IT_IS
    )
    row, column = 32 // 16, 64 // 16
    steps = (-1, 0, 1)
    grid = {(16 * (column + i), 16 * (row + j)) for i in steps for j in steps}
    assert {tuple(p) for p in upper.positions.tolist()} == grid
    assert (upper.stride, lower.stride, lower.layer) == (16, 8, "levels.1.blocks.0")
    finer = [(x + 8 * i, y + 8 * j) for x, y in grid for i in steps for j in steps]
    first = lower.groups == 0
    assert sorted(map(tuple, lower.positions[first].tolist())) == sorted(map(tuple, finer))
    assert np.unique(lower.weights).tolist() == [1.0]


def test_every_layer_down_to_the_first_is_composed(model, image):
    levels = sampling_points(model, image, "levels.3.blocks.0", (64, 32), depth=5)
    assert [points.layer for points in levels] == [
        "levels.3.blocks.0",
        "levels.2.blocks.1",
        "levels.2.blocks.0",
        "levels.1.blocks.0",
        "levels.0.blocks.0",
    ]
    assert [points.stride for points in levels] == [32, 16, 16, 8, 4]
    assert all(len(points.weights) <= 2000 for points in levels)


def test_the_strongest_points_are_kept_in_order(model, image):
    [every] = sampling_points(model, image, "levels.1.blocks.0", (10, 10))
    [kept] = sampling_points(model, image, "levels.1.blocks.0", (10, 10), max_points=5)
    strength = np.abs(every.weights)
    chosen = np.sort(np.argsort(-strength)[:5])
    assert (kept.positions == every.positions[chosen]).all()
    assert (kept.groups == every.groups[chosen]).all()
    assert kept.omitted == pytest.approx(1 - strength[chosen].sum() / strength.sum())
    assert (every.omitted, kept.num_groups) == (0, every.num_groups)


def test_points_without_weights_can_be_omitted():
    zeros = torch.zeros(3, dtype=torch.float64)
    taps, omitted = strongest(Taps(zeros, zeros, zeros, zeros), 2)
    assert (len(taps.x), omitted) == (2, 0)


def test_nothing_is_read_below_a_layer_without_modulation(image):
    levels = sampling_points(nano(0), image, "levels.2.blocks.0", (10, 10), 3)
    assert [len(points.weights) for points in levels] == [8 * 9, 0, 0]
    assert not levels[0].weights.any()


# Coordinates


def test_units_are_centered_on_their_receptive_fields(image):
    model = nano(0).eval()  # fresh layers of DCNv4 return zeros
    x = AS_IT_IS(np.tile(image, (2, 2, 1))).requires_grad_()
    for stage, output in enumerate(model.forward_intermediates(x, intermediates_only=True)):
        stride = 4 * 2**stage
        [grad] = torch.autograd.grad(output[0, 0, 2, 3], x, retain_graph=True)
        rows, columns = grad[0].abs().sum(0).nonzero(as_tuple=True)
        assert (rows.min() + rows.max(), columns.min() + columns.max()) == (4 * stride, 6 * stride)
        mapping = Mapping((192, 256), (192, 256))
        assert mapping.to_unit((3 * stride, 2 * stride), stride) == (2, 3)
        assert mapping.to_image(torch.tensor(3), torch.tensor(2), stride) == (
            3 * stride,
            2 * stride,
        )


def test_resized_images_have_half_pixel_centers():
    mapping = Mapping((48, 64), (96, 128))
    x, y = mapping.to_image(torch.tensor(0.0), torch.tensor(2.0), stride=4)
    assert (x.item(), y.item()) == (-0.25, 3.75)
    assert mapping.to_unit((0, 4), 4) == (2, 0)
    assert mapping.to_unit((63, 47), 4) == (23, 31)
    assert mapping.to_unit((63, 47), 32) == (2, 3)


def test_points_of_an_enlarged_image_are_in_its_own_pixels(regular, image):
    enlarged = replace(AS_IT_IS, size=192)
    [points] = sampling_points(
        regular, image, "levels.0.blocks.0", (20, 30), preprocessing=enlarged
    )
    assert sorted(set(points.positions[:, 0].tolist())) == [17.75, 19.75, 21.75]
    assert sorted(set(points.positions[:, 1].tolist())) == [27.75, 29.75, 31.75]


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pixel": (128, 0)}, "pixel must be inside the image of 128 x 96 pixels, got 128,0"),
        ({"pixel": (0, -1)}, "pixel must be inside the image"),
        ({"depth": 0}, "depth must be from 1 to 3, the layers from levels.2.blocks.0 down to "),
        ({"depth": 4}, "down to levels.0.blocks.0, got 4"),
        ({"max_points": 0}, "max_points must be at least 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_rejected(arguments, message, model, image):
    settings = {"layer": "levels.2.blocks.0", "pixel": (1, 1), **arguments}
    with pytest.raises(ValueError, match=message):
        sampling_points(model, image, **settings)


def test_other_arrays_than_rgb_are_rejected(model, image):
    for wrong in (image[..., 0], image / 255):
        with pytest.raises(ValueError, match=r"image must be an \(H, W, 3\) uint8 array, got"):
            sampling_points(model, wrong, "levels.2.blocks.0", (1, 1))
