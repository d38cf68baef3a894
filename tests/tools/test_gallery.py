"""Test the program that draws the pictures of the documentation."""

import json

import numpy as np
import pytest
from PIL import Image

from tools import gallery


def test_demos_that_have_not_been_run_are_named(tmp_path, capsys):
    arguments = ["--output", str(tmp_path), "--data", str(tmp_path), "--to", str(tmp_path / "to")]
    assert gallery.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    for line, command in zip(lines, gallery.DEMOS.values(), strict=True):
        assert line.startswith(f"python -m tools.gallery: error: {tmp_path}")
        assert line.endswith(f"does not exist: run `{command}`")
    assert not (tmp_path / "to").exists()
    assert gallery.main(["detection", *arguments]) == 2
    assert "make demo-detection" in capsys.readouterr().err


def test_an_unknown_picture_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        gallery.main(["detections"])
    assert "PICTURE: must be one of classification, detection" in capsys.readouterr().err


def test_pictures_are_small_files(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (90, 80, 3), np.uint8)
    picture = np.asarray(Image.fromarray(noise).resize((800, 900), Image.Resampling.BICUBIC))
    path = gallery._save(picture, tmp_path / "picture.jpg")
    assert path.stat().st_size <= gallery.LARGEST
    assert Image.open(path).size == (800, 900)


def test_samples_of_the_diffusion_demo(tmp_path):
    samples = tmp_path / "digits-diffusion" / "samples.png"
    samples.parent.mkdir()
    Image.new("RGB", (40, 30), "red").save(samples)
    folder = str(tmp_path)
    assert gallery.main(["diffusion", "--output", folder, "--data", folder, "--to", folder]) == 0
    assert Image.open(tmp_path / "gallery-diffusion.png").getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.slow  # imports OpenMMLab
@pytest.mark.mm
def test_curves_of_the_demos(tmp_path):
    for demo in gallery.DEMOS:
        (tmp_path / demo / "1" / "vis_data").mkdir(parents=True)
        (tmp_path / demo / ("best.pth" if demo == "digits" else "last_checkpoint")).touch()
    (tmp_path / "digits" / "metrics.csv").write_text("epoch,val_top1\n1,50\n2,75.5\n")
    for demo, row in (
        ("digits-scenes", {"coco/bbox_mAP": 0.4, "coco/segm_mAP": 0.3, "step": 1}),
        ("digits-scenes-ade20k", {"mIoU": 60.5, "step": 100}),
    ):
        (tmp_path / demo / "1" / "vis_data" / "scalars.json").write_text(json.dumps(row))
    folder = str(tmp_path)
    assert gallery.main(["curves", "--output", folder, "--data", folder, "--to", folder]) == 0
    path = tmp_path / "gallery-curves.png"
    assert Image.open(path).width == 800
    assert path.stat().st_size <= gallery.LARGEST
