"""Test `flash-internimage analyze`; models of OpenMMLab are analyzed in tests of their folders."""

import json
import os
import re
from pathlib import Path

import pytest
import timm
import torch

from flash_internimage.classification.evaluation import evaluate_checkpoint
from flash_internimage.cli import analyze
from flash_internimage.cli.analyze import main
from flash_internimage.cli.demo_data import write_digits
from flash_internimage.configs import find_config

DIGITS = "flash_internimage_nano_digits"
RELEASED = "mask_rcnn_flash_internimage_t_fpn_1x_coco"
FIGURES = ("top1", "top5", "loss", "images", "corrupt")


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """Return a folder with the digits, of which a few are evaluated, and a random checkpoint."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder / "data")
    for images in (folder / "data" / "val").iterdir():
        for image in sorted(images.iterdir())[3:]:
            image.unlink()
    (folder / "data" / "val" / "3" / "broken.png").write_text("no image")
    torch.manual_seed(0)
    model = timm.create_model("flash_internimage_nano", num_classes=10)
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    return folder


@pytest.mark.slow
def test_the_report_has_the_figures_of_the_evaluation(digits, tmp_path, capsys):
    checkpoint, data = str(digits / "model.pth"), str(digits / "data")
    options = ["--data", data, "-o", str(tmp_path / "report"), "--workers", "0"]
    assert main([DIGITS, checkpoint, *options, "--pictures", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("report.md\n")
    config = next(Path(__file__).parents[3].glob(f"configs/classification/{DIGITS}.yaml"))
    expected = evaluate_checkpoint(config, checkpoint=checkpoint, data=data, workers=0)
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert {name: summary[name] for name in FIGURES} == {name: expected[name] for name in FIGURES}
    assert (summary["images"], summary["corrupt"]) == (30, 1)
    lines = (tmp_path / "report" / "mistakes.csv").read_text().splitlines()
    assert len(lines) - 1 == 30 - round(0.3 * summary["top1"])
    for line in lines[1:]:
        path, label, *_ = line.split(",")
        assert os.path.isfile(path)
        assert Path(path).parent.name == label
    assert (tmp_path / "report" / "mistakes.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([DIGITS, "m.pth", "-o", "OUT", "--pictures", "-1"], "--pictures must be from 0 to 1000"),
        ([DIGITS, "m.pth", "-o", "FILE"], "-o file cannot be written"),
        ([DIGITS, "m.pth", "-o", "OUT", "--workers", "-1"], "--workers must be at least 0"),
        ([DIGITS, "m.pth", "-o", "OUT", "--data", "here"], "data.root not found: here"),
        ([DIGITS, "-o", "OUT", "optimizer.lr=1"], "key=value must set one of"),
        (["resnet19", "-o", "OUT"], "model must be a name of the zoo or of timm, or a config, got"),
        (["FILE", "-o", "OUT"], "config must end in .py, .yaml or .yml"),
        (["runs", "missing", "-o", "OUT/a.png"], "RUN must be the folder of a run, got missing"),
        (["runs", "missing", "-o", "."], "-o must be a file, got the folder ."),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    given = [a.replace("OUT", "report").replace("FILE", "file") for a in arguments]
    assert main(given) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line)


@pytest.mark.parametrize("model", [RELEASED, str(find_config(RELEASED))])
def test_released_weights_are_the_default_of_their_config(model, tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(analyze, "_analyze", lambda arguments: chosen.append(arguments) or {})
    assert main([model, "-o", str(tmp_path)]) == 0
    assert chosen[0].checkpoint.endswith(f"/{RELEASED}.pth")


def test_several_processes_are_rejected(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([DIGITS, "m.pth", "-o", str(tmp_path)]) == 2
    assert "WORLD_SIZE must be 1" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["runs", "--help"], [DIGITS, "--help"]])
def test_help_names_the_options(capsys, arguments):
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    assert "-o" in capsys.readouterr().out


def test_runs_are_compared(tmp_path, capsys):
    (tmp_path / "metrics.csv").write_text("epoch,lr,train_loss\n1,0.1,2.0\n2,0.1,1.5\n")
    assert main(["runs", str(tmp_path), "-o", str(tmp_path / "new" / "curves.csv")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'new' / 'curves.csv'}\n"
    assert len((tmp_path / "new" / "curves.csv").read_text().splitlines()) == 5
