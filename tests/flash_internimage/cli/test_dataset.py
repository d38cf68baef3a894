"""Tests of the command line `flash-internimage dataset`."""

import io
import signal

import pytest

from flash_internimage.cli.dataset import main
from tests.flash_internimage.own_data.datasets import write_image, write_text


@pytest.fixture
def yolo(tmp_path):
    for i in range(2):
        write_image(tmp_path / f"in/images/{i}.jpg", i)
        write_text(tmp_path / f"in/labels/{i}.txt", "0 0.25 0.2 0.75 0.2 0.75 0.8\n0 0.5\n")
    write_text(tmp_path / "in/classes.txt", "leaf\n")
    return tmp_path / "in"


@pytest.fixture
def flowers(tmp_path):
    for i, name in enumerate(("rose", "tulip")):
        write_image(tmp_path / f"flowers/train/{name}/1.jpg", i)
        write_image(tmp_path / f"flowers/val/{name}/1.jpg", i + 2)
    return tmp_path / "flowers"


def test_convert_prints_what_was_written_and_what_was_lost(yolo, tmp_path, capsys, caplog):
    assert main(["convert", "yolo", str(yolo), str(tmp_path / "coco")]) == 0
    assert capsys.readouterr().out == (
        "train: 2 images, 2 objects\n"
        "classes (1): leaf\n"
        "left out or changed:\n"
        f"  2 malformed lines left out (the first: {yolo}/labels/0.txt, line 2: it must have 5 "
        "numbers, or a class and 3 or more points, got 2)\n"
        f"{tmp_path / 'coco'}\n"
    )
    assert "no validation split: --val-fraction 0.2 holds out a fifth" in caplog.text


def test_config_writes_or_prints_a_config_and_check_reads_it(flowers, tmp_path, capsys):
    command = ["config", "folder", str(flowers), "--model", "flash_internimage_nano"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# flash-internimage train my_config.yaml\n# 2 images of 2 classes\n")
    config = tmp_path / "flowers.yaml"
    assert main([*command, "-o", str(config)]) == 0
    assert main([*command, "-o", str(config)]) == 2
    assert f"-o must not exist unless --overwrite is given, got {config}" in capsys.readouterr().err
    assert main([*command, "-o", str(config), "--overwrite"]) == 0
    capsys.readouterr()
    assert main(["check", str(config), "-o", str(tmp_path / "report")]) == 0
    assert capsys.readouterr().out.endswith(f"no faults\n{tmp_path / 'report'}\n")
    written = sorted(path.name for path in (tmp_path / "report").iterdir())
    assert written == ["classes.csv", "contact_sheet.png", "faults.csv", "report.json"]
    write_text(flowers / "train/rose/2.jpg", "no image")
    assert main(["check", str(config)]) == 1
    assert "1 fault\nunreadable images (1):\n" in capsys.readouterr().out
    assert main(["check", str(config), "--set", "data.max_corrupt=0"]) == 1
    assert "2 faults" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("convert voc nowhere {0}/out", "SOURCE not found: nowhere"),
        ("convert yolo {0}/in {0}/in", "TARGET must not exist or be empty, got {0}/in"),
        ("convert yolo {0}/in {0}/out --val-fraction 1", "--val-fraction must be at least 0"),
        ("convert labelstudio {0}/in {0}/out --images x", "--images must be a folder, got x"),
        ("convert yolo {0}/in {0}/out --classes x", "--classes must be a file, got x"),
        ("convert voc {0}/in/classes.txt {0}/out", "SOURCE must be a folder, got {0}/in/classes"),
        ("check nowhere.py", "config not found: nowhere.py"),
        ("check {0}/in/classes.txt", "CONFIG must end in .yaml, .yml or .py, got"),
        ("check flash_internimage_nano_digits --near-duplicates 40", "must be from 0 to 32 bits"),
        ("check flash_internimage_nano_digits --near-duplicates --headers-only",
         "--near-duplicates must not be used with --headers-only"),
        ("check flash_internimage_nano_digits --set x", "--set must be KEY=VALUE, got x"),
        ("config coco nowhere --model dino-t", "SOURCE must be a folder, got nowhere"),
        ("config coco {0}/in --model dino-t -o x.yaml", "-o must end in .py, got x.yaml"),
        ("config coco {0}/in --model dina-t", "--model must be one of cascade_mask_rcnn-"),
        ("config ade {0}/in --model upernet-t --ignore-index 300", "--ignore-index must be from 0"),
        ("config folder {0}/in", "in must contain the folder train with a folder for each class"),
    ],
)  # fmt: skip
def test_misuse_is_one_line_that_names_the_argument(yolo, tmp_path, capsys, arguments, message):
    assert main(arguments.format(tmp_path).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message.format(tmp_path) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_conversion_leaves_nothing(yolo, tmp_path, capsys, monkeypatch, number):
    monkeypatch.setattr("shutil.copyfile", lambda *paths: signal.raise_signal(number))
    assert main(["convert", "yolo", str(yolo), str(tmp_path / "coco")]) == 128 + number
    assert capsys.readouterr().err == "interrupted\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_terminal_without_the_letters_of_a_class_is_no_error(yolo, tmp_path, monkeypatch):
    write_text(yolo / "classes.txt", "Blüte→\n")
    output = io.TextIOWrapper(io.BytesIO(), "latin-1")
    monkeypatch.setattr("sys.stdout", output)
    assert main(["convert", "yolo", str(yolo), str(tmp_path / "coco")]) == 0
    output.seek(0)
    assert "classes (1): Blüte\\u2192\n" in output.read()


def test_a_source_without_a_training_split_is_a_warning(yolo, tmp_path, caplog):
    write_text(yolo / "data.yaml", "val: images\nnames: [leaf]\n")
    assert main(["convert", "yolo", str(yolo), str(tmp_path / "coco")]) == 0
    assert "no training split, got val" in caplog.text
