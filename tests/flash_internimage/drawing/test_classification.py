"""Test pictures of classes and scores."""

import numpy as np
import pytest

from flash_internimage.drawing import class_colors, draw_classification
from flash_internimage.predictions import Classification


def result(*scores: float, names=None) -> Classification:
    names = names or tuple(f"class {i}" for i in range(len(scores)))
    return Classification(np.array(scores, np.float32), np.arange(len(scores)), names)


def bars(picture: np.ndarray, height: int) -> list[int]:
    """Return the lengths of the bars below an image of a height."""
    below = (picture[height:] == class_colors(2)[1]).all(2).sum(1)
    starts = np.flatnonzero((below[1:] > 0) & (below[:-1] == 0)) + 1
    return below[starts].tolist()


def test_bars_are_as_long_as_the_scores():
    image = np.full((400, 640, 3), 90, np.uint8)
    picture = draw_classification(image, result(0.8, 0.2, 0.1))
    assert (picture[:400] == image).all()
    lengths = bars(picture, 400)
    assert len(lengths) == 3
    np.testing.assert_allclose(np.array(lengths) / lengths[0], [1, 0.25, 0.125], atol=0.01)


@pytest.mark.parametrize("size", [(1, 1), (28, 28), (1, 200), (900, 10)])
def test_small_images_are_enlarged(size):
    picture = draw_classification(np.zeros((*size, 3), np.uint8), result(1.0), caption="Prediction")
    assert picture.shape[1] >= 640


def test_long_and_foreign_names_and_no_classes():
    image = np.zeros((64, 64, 3), np.uint8)
    picture = draw_classification(image, result(0.5, 0.3, names=("Straßenbahn " * 20, "трамвай")))
    assert len(bars(picture, 640)) == 2
    assert draw_classification(image, result()).shape[1] == 640
