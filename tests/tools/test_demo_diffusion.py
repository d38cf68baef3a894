"""Tests of the diffusion demo."""

import json
import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy.linalg import sqrtm
from sklearn.datasets import load_digits

from flash_internimage.cli import demo_data
from flash_internimage.inference import load_predictor
from tools import demo_diffusion
from tools.demo_diffusion import (
    MODELS,
    frechet_distance,
    load_features,
    make_unet,
    sample,
    train,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_frechet_distance_is_that_of_scipy():
    a, b = torch.randn(50, 8), torch.randn(40, 8) @ torch.randn(8, 8) + 1
    means = [x.double().mean(0).numpy() for x in (a, b)]
    covariances = [np.cov(x.double().numpy(), rowvar=False) for x in (a, b)]
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = np.square(means[0] - means[1]).sum() + np.trace(sum(covariances) - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a + 3) == pytest.approx(9 * 8, rel=1e-6)
    # Covariances S and 9 S with the same mean: tr(S + 9 S - 2 * 3 S).
    b, spread = 3 * a - 2 * a.mean(0), a.double().var(0).sum().item()
    assert frechet_distance(a, b) == pytest.approx(4 * spread, rel=1e-5)


def test_features_that_are_constant_have_a_distance():
    a = torch.randn(20, 4) * torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_a_stopped_training_continues_as_if_it_had_not_been_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_diffusion, "SAVE_EVERY", 2)
    monkeypatch.setattr(demo_diffusion, "BATCH_SIZE", 4)
    images = demo_diffusion.read_digits()

    def stop(step: int, loss: float) -> None:
        raise KeyboardInterrupt

    def run(path, report=lambda step, loss: None):
        unet = make_unet("resnets")
        return train(unet, images, 4, path, report), unet

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped.pth", stop)
    resumed, after = run(tmp_path / "stopped.pth")
    expected, unet = run(tmp_path / "whole.pth")
    assert len(expected) == 4
    assert resumed == expected
    assert all(map(torch.equal, after.parameters(), unet.parameters()))
    assert run(tmp_path / "whole.pth")[0] == expected
    with pytest.raises(ValueError, match=r"--steps must be 4 to resume from .*whole\.pth, got 5"):
        train(unet, images, 5, tmp_path / "whole.pth", stop)


def test_samples_are_images(monkeypatch):
    monkeypatch.setattr(demo_diffusion, "SAMPLING_STEPS", 2)
    images = sample(make_unet(None), 3)
    assert images.shape == (3, 1, 8, 8)
    assert images.isfinite().all()
    assert images.abs().max() <= 1


def test_features_are_the_input_of_the_last_layer_of_the_classifier(tmp_path, assert_near):
    classifier = timm.create_model("flash_internimage_nano", num_classes=10, drop_path_rate=0.0)
    torch.save({"model": classifier.state_dict()}, tmp_path / "best.pth")
    digits = demo_diffusion.read_digits()[:3]
    features = load_features(tmp_path / "best.pth")(digits)
    demo_data.write_digits(tmp_path / "digits")
    [index, *_] = [
        i for i, image in enumerate(load_digits().images)
        if torch.equal(torch.from_numpy(image).float() / 8 - 1, digits[0, 0])
    ]  # fmt: skip
    [file] = (tmp_path / "digits").rglob(f"{index:04d}.png")
    predictor = load_predictor(demo_diffusion.CLASSIFIER, tmp_path / "best.pth", device="cpu")
    x = predictor._transform(Image.open(file).convert("RGB"))[None]
    classifier.eval()
    expected = classifier.forward_head(classifier.forward_features(x), pre_logits=True)
    assert features.shape == (3, classifier.head.in_features)
    assert_near(features[:1], expected, 1e-5)


def test_the_demo_writes_and_prints_its_results(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_diffusion, "SAMPLING_STEPS", 1)
    monkeypatch.setattr(demo_diffusion, "SAVE_EVERY", 1)
    monkeypatch.setattr(demo_diffusion, "BATCH_SIZE", 4)
    monkeypatch.setattr(
        demo_diffusion, "load_features", lambda path: lambda x: x.flatten(1)[:, ::4]
    )
    demo_diffusion.run(2, 64, tmp_path / "best.pth", tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["models"].keys() == MODELS.keys()
    assert all(math.isfinite(figures["distance"]) for figures in result["models"].values())
    lines = (tmp_path / "losses.csv").read_text().splitlines()
    assert lines[0] == "step,unet,dcnv4-resnets,dcnv4-attentions"
    assert [line.partition(",")[0] for line in lines] == ["step", "1", "2"]
    assert Image.open(tmp_path / "samples.png").width > 1000
    output = capsys.readouterr().out
    assert f"{result['models']['unet']['distance']:.3f}" in output
    assert "loss, step 2" in output


def test_the_classifier_is_required(tmp_path, capsys):
    output = tmp_path / "output"
    arguments = ["--classifier", str(tmp_path / "best.pth"), "--output", str(output)]
    assert demo_diffusion.main(arguments) == 2
    assert capsys.readouterr().err.endswith("best.pth does not exist: run `make demo`\n")
    assert not output.exists()


@pytest.mark.parametrize("steps", ["0", "-5", "many"])
def test_bad_numbers_are_named(steps, capsys):
    with pytest.raises(SystemExit, match="2"):
        demo_diffusion.main(["--steps", steps])
    assert "--steps: must be an integer from 64 to 1000000" in capsys.readouterr().err
