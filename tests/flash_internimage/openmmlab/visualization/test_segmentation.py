"""Test the visualizer of segmentors."""

import numpy as np
import pytest
import torch
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from PIL import Image

from flash_internimage.drawing import draw_label_map, side_by_side
from flash_internimage.openmmlab.visualization.segmentation import CaptionedSegVisualizer
from flash_internimage.predictions import LabelMap

CLASSES = ("sky", "road", "tree")


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


@pytest.fixture
def sample() -> SegDataSample:
    truth = torch.zeros(1, 48, 64, dtype=torch.long)
    truth[:, 20:] = 2
    truth[:, :, :8] = 255
    predicted = truth.clone()
    predicted[:, 30:] = 1
    return SegDataSample(gt_sem_seg=PixelData(data=truth), pred_sem_seg=PixelData(data=predicted))


@pytest.fixture
def visualizer(tmp_path) -> CaptionedSegVisualizer:
    visualizer = CaptionedSegVisualizer(
        save_dir=str(tmp_path), vis_backends=[{"type": "LocalVisBackend"}]
    )
    visualizer.dataset_meta = {"classes": CLASSES, "palette": [[0, 0, 0]] * 3}
    return visualizer


def drawn(image: np.ndarray, data: PixelData, caption: str, **settings) -> np.ndarray:
    result = LabelMap(data.data[0].numpy(), CLASSES)
    return draw_label_map(image, result, caption=caption, **settings)


def test_ground_truth_and_prediction_are_side_by_side(image, sample, visualizer, tmp_path):
    visualizer.add_datasample("test_name", image, sample, step=3)
    expected = side_by_side(
        [
            drawn(image, sample.gt_sem_seg, "Ground truth"),
            drawn(image, sample.pred_sem_seg, "Prediction", ignore=None),
        ]
    )
    [path] = tmp_path.rglob("test_name_3.png")
    assert (np.array(Image.open(path)) == expected).all()


def test_inferencers_read_the_picture_of_a_prediction(image, sample, visualizer, tmp_path):
    visualizer.alpha = 0.3  # as MMSegInferencer sets it
    out_file = str(tmp_path / "picture.png")
    visualizer.add_datasample("name", image, sample, draw_gt=False, out_file=out_file)
    expected = drawn(image, sample.pred_sem_seg, "Prediction", ignore=None, opacity=0.3)
    assert (np.array(Image.open(out_file)) == expected).all()
    assert visualizer.get_image().shape == expected.shape


def test_another_ignore_index(image, sample, tmp_path):
    visualizer = CaptionedSegVisualizer(ignore_index=2)
    visualizer.dataset_meta = {"classes": CLASSES}
    out_file = str(tmp_path / "picture.png")
    visualizer.add_datasample("name", image, sample, draw_pred=False, out_file=out_file)
    expected = drawn(image, sample.gt_sem_seg, "Ground truth", ignore=2)
    assert (np.array(Image.open(out_file)) == expected).all()
