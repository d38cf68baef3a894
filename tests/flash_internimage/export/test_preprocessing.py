"""Tests of the preprocessing in the graph, against torchvision with Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import (
    CenterCrop,
    Compose,
    InterpolationMode,
    Normalize,
    Resize,
    ToTensor,
)

from flash_internimage.export.preprocessing import ImagePreprocessing
from flash_internimage.export.verification import sample_images

PHOTO = sample_images()[0]


def steps(size=40, crop=33, interpolation=InterpolationMode.BICUBIC) -> list:
    colors = Normalize((0.0, 0.0, 0.0), (1 / 255,) * 3)  # levels from 0 to 255
    return [Resize(size, interpolation), CenterCrop(crop), ToTensor(), colors]


@pytest.mark.parametrize("interpolation", [InterpolationMode.BILINEAR, InterpolationMode.BICUBIC])
@pytest.mark.parametrize("size", [40, (40, 60)])
@pytest.mark.parametrize("image", [PHOTO, PHOTO[:301, 200:400], PHOTO[:20, :33]])
def test_pixels_are_those_of_pillow(image, size, interpolation):
    transforms = steps(size, 33, interpolation)
    expected = Compose(transforms)(Image.fromarray(image))
    images = torch.from_numpy(np.ascontiguousarray(image))[None]
    [actual] = ImagePreprocessing(transforms)(images)
    difference = (actual - expected).abs().round()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 5e-3


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        (steps()[1:], "must be Resize, CenterCrop, ToTensor and Normalize .*, got CenterCrop, "),
        (steps(32), "size must be at least 33, got 32"),
        (steps(interpolation=InterpolationMode.NEAREST), "must be bilinear or bicubic"),
    ],
)
def test_other_steps_are_refused(transforms, message):
    with pytest.raises(ValueError, match=message):
        ImagePreprocessing(transforms)
