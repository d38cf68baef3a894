"""Tests of offset lengths and effective receptive fields."""

import numpy as np
import pytest
import torch

from flash_internimage.sampling import (
    Preprocessing,
    effective_receptive_field,
    offset_lengths,
    sampling_points,
)
from tests.flash_internimage.models import nano

AS_IT_IS = Preprocessing()


def test_offsets_are_distances_from_the_regular_grid(model, image):
    half = Preprocessing(size=48)
    [offsets] = offset_lengths(model, image, ["levels.1.blocks.0"], preprocessing=half)
    assert offsets.lengths.shape == (6, 8)
    [points] = sampling_points(model, image, "levels.1.blocks.0", (80, 48), preprocessing=half)
    stride = 8 * 2  # pixels of the image
    taps = [(column, row) for column in (-1, 0, 1) for row in (-1, 0, 1)]
    center = 5 * stride + 0.5, 3 * stride + 0.5
    grid = np.asarray(center) + stride * np.tile(taps, (points.num_groups, 1))
    distances = np.linalg.norm(points.positions - grid, axis=1)
    assert offsets.lengths[3, 5] == pytest.approx(distances.mean() / stride, rel=1e-5)
    assert offsets.mean_in_image == pytest.approx(offsets.lengths.mean() * stride)


def test_offsets_include_the_scale(image):
    lengths = []
    for scale in (1.0, 2.0):
        model = nano(0, offset_scale=scale).eval()
        model.levels[0].blocks[0].dcn.offset_mask.bias.data[:] = 0.6
        [offsets] = offset_lengths(model, image, ["levels.0.blocks.0"])
        lengths.append(offsets.mean)
    assert lengths == pytest.approx([0.6 * 2**0.5, 1.2 * 2**0.5])


def test_offsets_of_all_layers(model, image):
    found = offset_lengths(model, image, preprocessing=AS_IT_IS)
    assert [offsets.lengths.shape for offsets in found] == [
        (24, 32), (12, 16), (6, 8), (6, 8), (3, 4)]  # fmt: skip
    with pytest.raises(ValueError, match="layers must not be empty"):
        offset_lengths(model, image, [])


def test_the_field_of_the_stem_is_its_window(image):
    model = nano(0).eval()  # fresh layers of DCNv4 return zeros
    field = effective_receptive_field(
        model, image, "levels.0.blocks.0", (40, 20), preprocessing=AS_IT_IS
    )
    rows, columns = field.nonzero()
    assert (field.shape, field.sum()) == ((96, 128), pytest.approx(1))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (17, 23, 37, 43)
    assert len(rows) == 49


def test_the_field_is_that_of_the_jacobian(model, image):
    """For normal weights, the mean absolute value is proportional to the norm over channels."""
    small = image[:32, :32]

    def unit(x: torch.Tensor) -> torch.Tensor:
        return model.levels[0].blocks[0](model.patch_embed(x))[0, 3, 5]

    jacobian = torch.autograd.functional.jacobian(unit, AS_IT_IS(small), vectorize=True)
    expected = jacobian[:, 0].double().norm(dim=0).sum(0).numpy()
    field = effective_receptive_field(
        model, small, "levels.0.blocks.0", (20, 12), samples=200, preprocessing=AS_IT_IS
    )
    assert np.abs(field - expected / expected.sum()).sum() < 0.05


def test_images_and_seeds_are_averaged(model, image):
    settings = {"layer": "levels.1.blocks.0", "pixel": None, "preprocessing": AS_IT_IS}
    flipped = image[::-1].copy()
    field = effective_receptive_field(model, [image, flipped], **settings)
    again = effective_receptive_field(model, [image, flipped], **settings)
    other = effective_receptive_field(model, [image, flipped], seed=1, **settings)
    single = effective_receptive_field(model, image, **settings)
    assert (field == again).all()
    assert not (field == other).all()
    assert not (field == single).all()
    rows, columns = np.indices(field.shape)
    assert abs((field * rows).sum() - 48) < 8
    assert abs((field * columns).sum() - 64) < 8


def test_no_gradients_of_parameters_are_left(model, image):
    model.set_grad_checkpointing()
    effective_receptive_field(model, image, "levels.1.blocks.0", samples=1)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"pixel": (0, 96)}, "pixel must be inside the image of 128 x 96 pixels"),
        ({"images": []}, r"images must have one size, got \[\]"),
        ({"layer": "levels.9"}, "layer must be"),
    ],
)
def test_arguments_out_of_range_are_rejected(arguments, message, model, image):
    settings = {"images": image, "layer": "levels.0.blocks.0", **arguments}
    with pytest.raises(ValueError, match=message):
        effective_receptive_field(model, **settings)
