"""Tests of detectors and segmentors against the inference of mmdet and mmseg."""

import copy

import numpy as np
import pytest
import torch
from mmcv.transforms import Compose
from mmdet.apis import inference_detector, init_detector
from mmengine.dataset import pseudo_collate
from mmengine.registry import MODELS, DefaultScope
from mmseg.apis import inference_model, init_model
from PIL import Image

from flash_internimage.checkpoints import Entry
from flash_internimage.configs import find_config
from flash_internimage.inference import detector, load_predictor, segmentor
from flash_internimage.openmmlab.safe_loading import safe_loading
from tests.nano import DETECTOR, LETTERS, SEGMENTOR
from tests.recipes import load_config

IMAGES = [
    np.random.default_rng(i).integers(0, 256, shape, np.uint8)
    for i, shape in enumerate([(48, 64, 3), (48, 64, 3), (70, 30, 3)])
]

SMALL = IMAGES[0][..., 0].size
LARGE = np.kron(IMAGES[0], np.ones((4, 4, 1), np.uint8))  # the first image, enlarged
THRESHOLD = 0.1


@pytest.fixture(autouse=True)
def always_clean(one_thread, restore_scope):
    """Apply to all tests of this module."""


@pytest.fixture(scope="module")
def mmdet_model(weights):
    return init_detector(str(find_config(DETECTOR)), str(weights[DETECTOR]), device="cpu")


@pytest.fixture(scope="module")
def mmseg_model(weights):
    return init_model(str(find_config(SEGMENTOR)), str(weights[SEGMENTOR]), device="cpu")


@pytest.fixture(scope="module")
def detect(weights):
    """Return a detector whose threshold about half of the boxes exceed."""
    return load_predictor(DETECTOR, weights[DETECTOR], score_threshold=THRESHOLD)


@pytest.fixture(scope="module")
def segment(weights):
    return load_predictor(SEGMENTOR, weights[SEGMENTOR])


@pytest.mark.slow
def test_detections_are_those_of_mmdet(detect, mmdet_model):
    assert (detect.task, detect.classes) == ("detection", LETTERS[DETECTOR])
    with safe_loading(), DefaultScope.overwrite_default_scope("mmdet"):
        samples = inference_detector(mmdet_model, [image[..., ::-1] for image in IMAGES])
    for image, result, sample in zip(IMAGES, detect(IMAGES), samples, strict=True):
        expected = sample.pred_instances
        expected = expected[expected.scores >= THRESHOLD]
        assert 0 < len(expected) < len(sample.pred_instances)
        assert (np.diff(result.scores) <= 0).all()
        np.testing.assert_allclose(result.boxes, expected.bboxes, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(result.scores, expected.scores, rtol=1e-4)
        np.testing.assert_array_equal(result.labels, expected.labels)
        assert result.masks.shape == (len(expected), *image.shape[:2])
        assert (result.masks == expected.masks.numpy()).mean() > 0.999
        dtypes = result.boxes.dtype, result.scores.dtype, result.labels.dtype, result.masks.dtype
        assert dtypes == (np.float32, np.float32, np.int64, bool)
    assert detect([]) == []


def test_label_maps_are_those_of_mmseg(segment, mmseg_model):
    assert (segment.task, segment.classes) == ("segmentation", LETTERS[SEGMENTOR])
    with safe_loading(), DefaultScope.overwrite_default_scope("mmseg"):
        samples = [inference_model(mmseg_model, image[..., ::-1]) for image in IMAGES]
    for result, sample in zip(segment(IMAGES), samples, strict=True):
        expected = sample.pred_sem_seg.data[0].numpy()
        assert len(np.unique(expected)) > 3
        assert (result.labels == expected).mean() > 0.999
        assert result.labels.dtype == np.uint8


def test_test_time_augmentation_is_that_of_the_config(segment, weights, mmseg_model, tmp_path):
    cfg = load_config("segmentation", SEGMENTOR)
    path = str(tmp_path / "image.png")
    Image.fromarray(IMAGES[0]).save(path)
    with DefaultScope.overwrite_default_scope("mmseg"):
        pipeline = Compose(copy.deepcopy(cfg.tta_pipeline))
        model = MODELS.build({**cfg.tta_model, "module": mmseg_model})
        with torch.no_grad():
            [expected] = model.test_step(pseudo_collate([pipeline({"img_path": path})]))
    [result] = load_predictor(SEGMENTOR, weights[SEGMENTOR], tta=True)(IMAGES[:1])
    assert (result.labels == expected.pred_sem_seg.data[0].numpy()).mean() > 0.999
    assert (result.labels == segment(IMAGES[:1])[0].labels).mean() < 0.95


def test_an_image_in_a_batch_equals_the_image_alone(segment):
    for image, expected in zip(IMAGES, segment(IMAGES), strict=True):
        assert (segment([image])[0].labels == expected.labels).mean() > 0.999


def test_images_of_one_pixel(detect, segment):
    pixel = IMAGES[0][:1, :1]
    [found] = detect([pixel])
    assert found.masks.shape == (len(found.boxes), 1, 1)
    [result] = segment([pixel])
    assert result.labels.shape == (1, 1)


def test_large_images_are_reduced_and_their_masks_enlarged(detect, monkeypatch, caplog):
    assert detect._max_pixels == detector.MAX_PIXELS_WITH_MASKS
    [small] = detect(IMAGES[:1])
    monkeypatch.setattr(detect, "_max_pixels", SMALL)
    [found] = detect([LARGE])
    np.testing.assert_allclose(found.boxes, 4 * small.boxes, rtol=1e-4, atol=1e-2)
    np.testing.assert_array_equal(found.masks, np.kron(small.masks, np.ones((1, 4, 4), bool)))
    assert "256 x 192 pixels is reduced to 64 x 48 to save memory" in caplog.text
    monkeypatch.setattr(detector, "MAX_MASKS", 100)
    with pytest.raises(ValueError, match=r"masks of 256 x 192 pixels .* raise the score thresh"):
        detect([LARGE])


def test_label_maps_of_large_images_are_enlarged(segment, monkeypatch):
    assert segment._max_pixels == segmentor.MAX_LOGITS / 5
    [small] = segment(IMAGES[:1])
    monkeypatch.setattr(segment, "_max_pixels", SMALL)
    [large] = segment([LARGE])
    np.testing.assert_array_equal(large.labels, np.kron(small.labels, np.ones((4, 4), np.uint8)))
    assert large.labels.dtype == np.uint8


def test_mixed_precision_is_close(weights, segment):
    [mixed] = load_predictor(SEGMENTOR, weights[SEGMENTOR], dtype="bfloat16")(IMAGES[:1])
    assert 0.9 < (segment(IMAGES[:1])[0].labels == mixed.labels).mean() < 1


def test_a_name_of_the_zoo_stands_for_config_and_weights(weights, monkeypatch):
    entry = Entry(
        task="segmentation",
        architecture="UPerNet",
        backbone="T",
        pretraining="none",
        config=f"configs/segmentation/{SEGMENTOR}.py",
        addresses=["https://example.org/never-asked.pth"],
        resolution=160,
        parameters=1,
    )
    monkeypatch.setattr("flash_internimage.inference.predictor.read_zoo", lambda: {"mine": entry})
    monkeypatch.setattr(Entry, "fetch", lambda entry, offline=False: weights[SEGMENTOR])
    for name in ("mine", SEGMENTOR):
        assert load_predictor(name).classes == LETTERS[SEGMENTOR]


def test_class_names_come_from_the_config_if_the_checkpoint_has_none(weights, tmp_path):
    torch.save(torch.load(weights[SEGMENTOR])["state_dict"], tmp_path / "bare.pth")
    predictor = load_predictor(SEGMENTOR, tmp_path / "bare.pth")
    assert predictor.classes == ("background", *"0147")


@pytest.mark.slow
def test_models_that_cannot_be_loaded(weights, tmp_path):
    with pytest.raises(ValueError, match=f"checkpoint must be given for {DETECTOR}"):
        load_predictor(DETECTOR)
    with pytest.raises(ValueError, match="the checkpoint does not match the model"):
        load_predictor(SEGMENTOR, weights[DETECTOR])
    contents = torch.load(weights[SEGMENTOR])
    contents["meta"]["dataset_meta"]["classes"] = ("a", "b")
    torch.save(contents, tmp_path / "two.pth")
    with pytest.raises(ValueError, match="must have 5 class names, got 2"):
        load_predictor(SEGMENTOR, tmp_path / "two.pth")
    config = tmp_path / "config.py"
    config.write_text(f"_base_ = '{find_config(SEGMENTOR)}'\ntta_pipeline = None\n")
    with pytest.raises(ValueError, match="its config has no tta_pipeline"):
        load_predictor(config, weights[SEGMENTOR], tta=True)
    config.write_text(f"_base_ = '{find_config(SEGMENTOR)}'\nmodel = dict(neck=1)\n")
    with pytest.raises(ValueError, match="cannot be built"):
        load_predictor(config, weights[SEGMENTOR])
    config.write_text("default_scope = 'mmpose'\n")
    with pytest.raises(ValueError, match="must be 'mmdet' or 'mmseg', got 'mmpose'"):
        load_predictor(config, weights[SEGMENTOR])
