"""Tests of the preprocessing of images, against timm and OpenMMLab's settings."""

from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from torch import nn

from flash_internimage.sampling import Preprocessing, preprocessing_of


class Detector(nn.Module):
    """The attributes of OpenMMLab's models that are read."""

    def __init__(self, cfg=None):
        super().__init__()
        self.data_preprocessor = SimpleNamespace(
            mean=torch.tensor([[[10.0]], [[20.0]], [[30.0]]]), std=torch.full((3, 1, 1), 2.0)
        )
        if cfg is not None:
            self.cfg = cfg


def test_a_square_image_becomes_the_input_of_timm(model, image):
    square = image[:96, :96]
    transform = create_transform((3, 64, 64), interpolation="bicubic", crop_pct=1.0)
    expected = transform(Image.fromarray(square))[None]
    actual = preprocessing_of(model)(square)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_timm_settings_are_those_of_the_model():
    settings = {"input_size": (3, 48, 48), "mean": (0.1, 0.2, 0.3), "std": (1.0, 0.5, 0.25)}
    model = timm.create_model("flash_internimage_nano", pretrained_cfg_overlay=settings)
    found = preprocessing_of(model)
    assert (found.size, found.max_size) == (48, None)
    assert found.mean == pytest.approx((25.5, 51, 76.5))
    assert found.std == pytest.approx((255, 127.5, 63.75))


def test_openmmlab_settings_are_those_of_the_model():
    pipeline = [{"type": "LoadImageFromFile"}, {"type": "Resize", "scale": (1333, 800)}]
    cfg = {"test_dataloader": {"dataset": {"pipeline": pipeline}}}
    colors = {"mean": (10.0, 20.0, 30.0), "std": (2.0, 2.0, 2.0)}
    assert preprocessing_of(Detector(cfg)) == Preprocessing(800, 1333, **colors)
    assert preprocessing_of(Detector()) == Preprocessing(**colors)
    assert preprocessing_of(nn.Identity()) == Preprocessing()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (300, 400)),
        ({"size": 150}, (150, 200)),
        ({"size": 600, "max_size": 700}, (525, 700)),
        ({"size": 600, "max_size": 900}, (600, 800)),
        ({"max_size": 4}, (3, 4)),
    ],
)
def test_sizes_are_those_of_torchvision(settings, expected):
    assert Preprocessing(**settings).input_size(300, 400) == expected
    assert Preprocessing(**settings).input_size(400, 300) == expected[::-1]


def test_colors_are_normalized():
    image = np.full((2, 3, 3), (10, 24, 30), dtype=np.uint8)
    x = preprocessing_of(Detector())(image)
    assert x.shape == (1, 3, 2, 3)
    assert x.amax((2, 3)).tolist() == x.amin((2, 3)).tolist() == [[0, 2, 0]]
