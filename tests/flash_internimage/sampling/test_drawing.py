"""Tests of the pictures: what the axes of the figures show, and the arrays that come out."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from flash_internimage.sampling import (
    OffsetLengths,
    Preprocessing,
    draw_maps,
    draw_sampling_points,
    sampling_points,
)
from flash_internimage.sampling.drawing import _show_image, plot_groups, plot_levels, plot_maps
from flash_internimage.sampling.points import Mapping

AS_IT_IS = Preprocessing()


def points_in(axis) -> list[list[float]]:
    return sorted(axis.collections[0].get_offsets().tolist())


def titles(axes) -> list[str]:
    return [axis.get_title() for axis in axes if axis.get_title()]


def test_there_is_a_panel_for_each_group(model, image):
    [points] = sampling_points(model, image, "levels.2.blocks.0", (70, 40), preprocessing=AS_IT_IS)
    figure = plot_groups(image, points, (120, 5), max_groups=16)
    whole, bar, *panels = figure.axes
    assert points_in(whole) == sorted(points.positions.tolist())
    assert bar.get_ylabel() == "modulation"
    assert titles(panels) == [f"group {i}" for i in range(8)]
    for group, panel in enumerate(p for p in panels if p.get_title()):
        own = points.positions[points.groups == group]
        assert points_in(panel) == sorted(own.tolist())
        (left, right), (bottom, top) = panel.get_xlim(), panel.get_ylim()
        assert ((own > (left, top)) & (own < (right, bottom))).all()
    x, y = points.positions.T
    outside = ((x < -0.5) | (x >= 127.5) | (y < -0.5) | (y >= 95.5)).sum()
    assert outside > 0
    assert whole.get_title() == f"72 points, {outside} outside the image"
    text = figure.get_suptitle()
    assert text == "levels.2.blocks.0: sampling points of pixel (120, 5) in 8 groups"


def test_colors_and_sizes_are_the_modulation(model, image):
    [points] = sampling_points(model, image, "levels.2.blocks.0", (70, 40))
    drawn = plot_groups(image, points, (70, 40), max_groups=16).axes[0].collections[0]
    weights, sizes = np.asarray(drawn.get_array()), drawn.get_sizes()
    assert sorted(weights) == sorted(points.weights)
    assert drawn.norm.vmax == -drawn.norm.vmin == np.abs(points.weights).max()
    assert (np.argsort(sizes, kind="stable") == np.argsort(np.abs(weights), kind="stable")).all()


def test_the_groups_with_the_largest_modulation_are_shown(model, image):
    [points] = sampling_points(model, image, "levels.2.blocks.0", (70, 40))
    figure = plot_groups(image, points, (70, 40), max_groups=3)
    strength = [np.abs(points.weights[points.groups == i]).sum() for i in range(8)]
    assert titles(figure.axes[1:]) == [f"group {i}" for i in sorted(np.argsort(strength)[-3:])]
    assert "in 8 groups; panels for the 3 with the largest" in figure.get_suptitle()


def test_large_images_are_reduced_and_only_drawn_in_their_window():
    image = np.zeros((30, 4100, 3), np.uint8)
    image[12, 3000] = 255
    axis = Figure().subplots()
    _show_image(axis, image)
    _show_image(axis, image, (2996.5, 3003.2, -3.0, 16.0))
    whole, part = axis.images
    assert whole.get_array().shape == (10, 1367, 3)
    assert whole.get_extent() == [-0.5, 4100.5, 29.5, -0.5]
    left, _, _, top = part.get_extent()
    row, column, _ = np.unravel_index(part.get_array().argmax(), part.get_array().shape)
    assert (left + column + 0.5, top + row + 0.5) == (3000, 12)


def test_there_is_a_panel_for_each_layer(model, image):
    levels = sampling_points(model, image, "levels.2.blocks.1", (70, 40), 4, max_points=100)
    axes = plot_levels(image, levels, (70, 40)).axes
    panels = [axis for axis in axes if axis.get_title()]
    for number, (panel, points) in enumerate(zip(panels, levels, strict=True), 1):
        assert points_in(panel) == sorted(points.positions.tolist())
        assert panel.get_title().startswith(
            f"{number}: {points.layer}\n{len(points.weights)} points"
        )
    assert f"{100 * (1 - levels[-1].omitted):.1f} % of the weights" in panels[-1].get_title()
    assert "%" not in panels[0].get_title()


def test_maps_lie_over_the_image(image):
    lengths = [OffsetLengths("levels.0.blocks.0", 4, 0.5, np.full((48, 64), 0.75))]
    mapping = Mapping((96, 128), (192, 256))
    field = np.ones((192, 256)) / (192 * 256)
    top, bottom, *_ = plot_maps(image, lengths, [field], (9, 8), mapping).axes
    assert top.images[1].get_extent() == [-1.25, 126.75, 94.75, -1.25]
    assert bottom.images[1].get_extent() == [-0.5, 127.5, 95.5, -0.5]
    assert top.get_xlim() == bottom.get_xlim() == (-0.5, 127.5)
    assert "mean offset 0.75 pixels of the layer,\n1.5 of the image" in top.get_title()


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "depth"), [((1, 1), 1), ((20, 200), 1), ((200, 20), 2)])
def test_pictures_of_any_image_are_large_enough(shape, depth, model):
    image = np.zeros((*shape, 3), np.uint8)
    picture = draw_sampling_points(model, image, "levels.1.blocks.0", (0, 0), depth)
    assert picture.dtype == np.uint8
    assert picture.shape[2] == 3
    assert 640 <= picture.shape[1] < 3000
    assert 300 <= picture.shape[0] < 3000


@pytest.mark.slow
def test_maps_of_a_model(model, image):
    picture = draw_maps(model, image, (3, 4), ["levels.1.blocks.0"], preprocessing=AS_IT_IS)
    again = draw_maps(model, image, (3, 4), ["levels.1.blocks.0"], preprocessing=AS_IT_IS)
    assert picture.shape[1] >= 640
    assert (picture == again).all()


def test_the_number_of_panels_is_checked(model, image):
    with pytest.raises(ValueError, match="max_groups must be at least 1, got 0"):
        draw_sampling_points(model, image, "levels.1.blocks.0", (0, 0), max_groups=0)
