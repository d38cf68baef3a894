"""Tests of classifiers."""

import logging

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models._registry import _model_entrypoints

from flash_internimage.classification.config import Data
from flash_internimage.classification.data.loaders import eval_transform
from flash_internimage.dropin import replace
from flash_internimage.inference import classify, load_predictor
from flash_internimage.inference.classify import class_names, describe_synsets
from tests.nano import CLASSIFIER, DIGITS, write_classifier

IMAGES = [
    np.random.default_rng(i).integers(0, 256, shape, np.uint8)
    for i, shape in enumerate([(40, 50, 3), (32, 32, 3), (90, 33, 3)])
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_classifier(tmp_path_factory.mktemp("classifier") / "best.pth")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return timm.create_model(CLASSIFIER, num_classes=7).eval()


def probabilities(model, transform, images) -> torch.Tensor:
    inputs = torch.stack([transform(Image.fromarray(image)) for image in images])
    with torch.no_grad():
        return model.eval()(inputs).softmax(1)


def assert_equal(results, expected, names) -> None:
    for result, row in zip(results, expected, strict=True):
        scores, labels = row.topk(len(result.scores))
        np.testing.assert_allclose(result.scores, scores, rtol=1e-5)
        np.testing.assert_array_equal(result.labels, labels)
        assert result.names == tuple(names[i] for i in labels)
        assert (result.scores.dtype, result.labels.dtype) == (np.float32, np.int64)


def test_classify_is_inference_with_timm(model, tmp_path):
    data = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**data, is_training=False)
    expected = probabilities(model, transform, IMAGES)
    Image.fromarray(IMAGES[0]).save(tmp_path / "image.png")
    images = [tmp_path / "image.png", IMAGES[1], Image.fromarray(IMAGES[2])]
    names = [f"class_{i}" for i in range(7)]
    assert_equal(classify(model, images), expected, names)
    assert_equal(classify(model, images[:1], top_k=2), expected[:1], names)
    assert len(classify(model, images[:1], top_k=99)[0].names) == 7
    assert classify(model, []) == []


def test_classify_with_another_transform(model):
    transform = eval_transform(Data(image_size=32))
    expected = probabilities(model, transform, IMAGES)
    names = [f"class_{i}" for i in range(7)]
    assert_equal(classify(model, IMAGES, transform=transform), expected, names)


def test_classify_keeps_the_training_mode(model):
    model.train()
    expected = classify(model, IMAGES)
    assert model.training
    model.eval()
    np.testing.assert_array_equal(classify(model, IMAGES)[0].scores, expected[0].scores)


def test_wrong_arguments_of_classify(model):
    with pytest.raises(ValueError, match="images must be a list of images, got a ndarray"):
        classify(model, IMAGES[0])
    with pytest.raises(ValueError, match=r"images\[1\] must be an .* uint8 array, got float64"):
        classify(model, [IMAGES[0], IMAGES[1] / 255])
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        classify(model, IMAGES, top_k=0)


def test_class_names(model, monkeypatch):
    assert class_names(model, 1000)[281] == "tabby, tabby cat"
    assert class_names(model, 21841)[0] == "organism, being"
    monkeypatch.setitem(model.pretrained_cfg, "label_names", list("abcdefg"))
    assert class_names(model, 7) == tuple("abcdefg")
    assert class_names(model, 5) == ("class_0", "class_1", "class_2", "class_3", "class_4")
    monkeypatch.setitem(model.pretrained_cfg, "label_descriptions", {"a": "first"})
    assert class_names(model, 7)[:2] == ("first", "b")
    assert describe_synsets(["n02123045"]) == ("tabby, tabby cat",)
    assert describe_synsets(["n02123045", "dog"]) == ("n02123045", "dog")


@pytest.mark.parametrize("model", [CLASSIFIER, "flash_internimage_nano_digits"])
def test_a_predictor_uses_preprocessing_and_classes_of_the_training(model, checkpoint):
    predictor = load_predictor(model, checkpoint, top_k=3)
    assert (predictor.task, predictor.classes) == ("classification", DIGITS)
    assert not predictor.model.training
    twin = timm.create_model(CLASSIFIER, num_classes=10)
    twin.load_state_dict(torch.load(checkpoint)["state_dict"])
    expected = probabilities(twin, eval_transform(Data(image_size=32)), IMAGES)
    results = predictor(IMAGES)
    assert_equal(results, expected, DIGITS)
    assert [len(result.names) for result in results] == [3, 3, 3]
    assert predictor([]) == []


def test_a_bare_state_dict_takes_the_preprocessing_of_timm(tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=4)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    predictor = load_predictor("resnet10t", tmp_path / "weights.pth")
    data = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**data, is_training=False)
    names = ("class_0", "class_1", "class_2", "class_3")
    assert_equal(predictor(IMAGES), probabilities(model, transform, IMAGES), names)


def test_mixed_precision(checkpoint):
    [single] = load_predictor(CLASSIFIER, checkpoint, top_k=10)(IMAGES[:1])
    [mixed] = load_predictor(CLASSIFIER, checkpoint, top_k=10, dtype="bfloat16")(IMAGES[:1])
    by_label = single.scores[np.argsort(single.labels)], mixed.scores[np.argsort(mixed.labels)]
    np.testing.assert_allclose(*by_label, atol=0.01)
    assert not np.array_equal(*by_label)


def test_models_that_cannot_be_loaded(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        ([CLASSIFIER], f"checkpoint must be given for {CLASSIFIER}, which has no released"),
        (["flash_internimage_nano_digits"], "which has no released weights"),
        (["resnet18.x"], r"model must be resnet18.a1_in1k or .*, got 'resnet18.x'"),
        (["flash_internimage_nan"], r"got 'flash_internimage_nan'; did you mean '.*nano'"),
        (["flash_internimage_tiny", checkpoint], "must be a checkpoint of flash_internimage_tiny"),
        (["flash_internimage_tiny_in1k_224", checkpoint], "does not match the model"),
        (["hf-hub:me/model", checkpoint], "checkpoint must not be given for hf-hub:me/model"),
    ):
        with pytest.raises(ValueError, match=message):
            load_predictor(*arguments)
    with pytest.raises(FileNotFoundError, match=r"config not found: mine\.yaml"):
        load_predictor("mine.yaml", checkpoint)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of 'float32', 'float16', 'bfloat16', got 'int8'"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_k": 2.5}, "top_k must be at least 1, got 2.5"),
        ({"score_threshold": "0.5"}, "score_threshold must be from 0 to 1, got '0.5'"),
        ({"score_threshold": 2}, "score_threshold must be from 0 to 1, got 2"),
        ({"tta": True}, "tta must be used with a segmentor, got flash_internimage_nano"),
        ({"device": "tpu"}, "device must be 'auto' or one of cpu"),
    ],
)
def test_wrong_arguments(option, message, checkpoint):
    with pytest.raises(ValueError, match=message):
        load_predictor(CLASSIFIER, checkpoint, **option)


def test_wrong_images_and_weights_that_are_not_finite(checkpoint):
    predictor = load_predictor(CLASSIFIER, checkpoint)
    for image, got in (
        (IMAGES[0][..., 0], r"uint8 of shape \(40, 50\)"),
        (IMAGES[0] / 255, "float64 of shape"),
        ("image.jpg", "str"),
    ):
        with pytest.raises(ValueError, match=rf"images\[1\] must be an .* uint8 array, got {got}"):
            predictor([IMAGES[1], image])
    torch.nn.init.constant_(predictor.model.head.bias, torch.nan)
    with pytest.raises(ValueError, match="the logits must be finite"):
        predictor(IMAGES)


def test_changed_settings_are_named(checkpoint, tmp_path, caplog):
    config = tmp_path / "config.yaml"
    config.write_text(
        "model: {name: flash_internimage_nano, num_classes: 10}\ndata: {image_size: 64}\n"
    )
    with caplog.at_level(logging.WARNING):
        load_predictor(config, checkpoint)
    assert "data.image_size is 64, was 32 in training" in caplog.text


def test_models_are_loaded_that_are_registered_without_a_pretrained_config(monkeypatch, tmp_path):
    def small_convnext(pretrained=False, **kwargs):
        sizes = {"depths": (1, 1, 1, 1), "dims": (16, 16, 16, 32)}
        return replace(timm.create_model("convnext_atto", **sizes, **kwargs))

    monkeypatch.setitem(_model_entrypoints, "small_convnext", small_convnext)
    model = timm.create_model("small_convnext", num_classes=7)
    torch.save(model.state_dict(), tmp_path / "best.pth")
    predictor = load_predictor("small_convnext", tmp_path / "best.pth", top_k=7)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    names = [f"class_{i}" for i in range(7)]
    assert_equal(predictor(IMAGES), probabilities(model, transform, IMAGES), names)
