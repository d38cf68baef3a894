"""Test the visualizer of detectors."""

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from mmengine.structures import InstanceData
from PIL import Image

from flash_internimage.drawing import draw_detections, side_by_side
from flash_internimage.openmmlab.visualization.detection import (
    CaptionedDetVisualizer,
    to_detections,
)
from flash_internimage.predictions import Detections

CLASSES = ("bolt", "nut")
BOX = [100.0, 120.0, 300.0, 320.0]


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)


@pytest.fixture
def visualizer() -> CaptionedDetVisualizer:
    visualizer = CaptionedDetVisualizer()
    visualizer.dataset_meta = {"classes": CLASSES}
    return visualizer


def predictions(scores: list[float], box: list[float] = BOX) -> InstanceData:
    n = len(scores)
    return InstanceData(
        bboxes=torch.tensor([box] * n).reshape(n, 4),
        scores=torch.tensor(scores),
        labels=torch.arange(n) % 2,
    )


def detections(labels: list[int], scores: list[float], classes=CLASSES) -> Detections:
    n = len(labels)
    boxes = np.array([BOX] * n, np.float32)
    return Detections(boxes, np.array(scores, np.float32), np.array(labels), None, classes)


def test_ground_truth_and_prediction_are_side_by_side(image, visualizer, tmp_path):
    truth = InstanceData(bboxes=HorizontalBoxes([BOX]), labels=torch.tensor([1]))
    sample = DetDataSample(gt_instances=truth, pred_instances=predictions([0.2, 0.4, 0.6]))
    visualizer.add_datasample("name", image, sample, out_file=str(tmp_path / "picture.png"))
    expected = side_by_side(
        [
            draw_detections(image, detections([1], [np.nan]), caption="Ground truth"),
            draw_detections(image, detections([0, 1], [0.6, 0.4]), caption="Prediction"),
        ]
    )
    assert (np.array(Image.open(tmp_path / "picture.png")) == expected).all()


def test_inferencers_read_the_picture_of_a_prediction(image, visualizer, tmp_path):
    sample = DetDataSample(pred_instances=predictions([0.9]))
    out_file = str(tmp_path / "picture.png")
    visualizer.add_datasample("name", image, sample, draw_gt=False, out_file=out_file)
    expected = draw_detections(image, detections([0], [0.9]), caption="Prediction")
    assert visualizer.get_image().shape == expected.shape
    assert np.abs(visualizer.get_image().astype(int) - expected).mean() < 2


def test_annotations_that_metrics_ignore_are_named(image, visualizer, tmp_path):
    truth = InstanceData(bboxes=torch.tensor([BOX]), labels=torch.tensor([1]))
    sample = DetDataSample(gt_instances=truth, ignored_instances=truth)
    visualizer.add_datasample("name", image, sample, out_file=str(tmp_path / "picture.png"))
    expected = detections([1, 2], [np.nan, np.nan], (*CLASSES, "ignored"))
    expected = draw_detections(image, expected, caption="Ground truth")
    assert (np.array(Image.open(tmp_path / "picture.png")) == expected).all()


def test_masks_of_all_kinds_are_converted():
    mask = np.zeros((1, 20, 30), bool)
    mask[0, 5:15, 10:20] = True
    polygon = np.array([10.0, 5, 20, 5, 20, 15, 10, 15])
    for masks in (
        torch.from_numpy(mask),
        BitmapMasks(mask.astype(np.uint8), 20, 30),
        PolygonMasks([[polygon]], 20, 30),
    ):
        instances = predictions([0.5])
        instances.masks = masks
        found = to_detections(instances, CLASSES).masks
        assert found.dtype == bool
        assert (found == mask).all()


def test_boxes_of_models_without_a_box_head_are_those_of_the_masks():
    instances = predictions([0.5], [0.0] * 4)
    instances.masks = torch.zeros(1, 20, 30, dtype=torch.bool)
    instances.masks[0, 5:15, 10:20] = True
    assert to_detections(instances, CLASSES).boxes.tolist() == [[10, 5, 20, 15]]


def test_images_without_objects(image, visualizer, tmp_path):
    instances = predictions([])
    instances.masks = torch.zeros(0, 480, 640, dtype=torch.bool)
    sample = DetDataSample(gt_instances=instances, pred_instances=instances)
    visualizer.add_datasample("name", image, sample, out_file=str(tmp_path / "picture.png"))
    picture = np.array(Image.open(tmp_path / "picture.png"))
    assert (picture[-480:, :640] == image).all()
    assert (picture[-480:, -640:] == image).all()
