"""Tests of the command export; the files are tested with the package."""

import pytest
from PIL import Image

from flash_internimage.cli import export
from flash_internimage.export import Comparison, DifferenceError, Report, Timing, formats
from flash_internimage_cli import main
from tests.nano import CLASSIFIER, DETECTOR, SEGMENTOR


@pytest.fixture
def calls(monkeypatch):
    """Replace the export, and return its arguments."""
    calls = []

    def export_model(predictor, path, *arguments, **options):
        calls.append((predictor.task, path.name, *arguments, options))
        shape = (2, 3, 32, 40)
        comparisons = [
            Comparison(shape, {"logits": 4e-7}, {"logits": 1e-7}, 1.0),
            Comparison(shape, {"stage1": 5e-7}, {"stage1": 2e-7}, None),
        ]
        return Report(path, 7_200_000, comparisons, [Timing(1, 0.02, 0.01)])

    monkeypatch.setattr(export, "export_model", export_model)
    return calls


def test_options_reach_the_function_and_the_report_is_printed(weights, tmp_path, calls, capsys):
    out = tmp_path / "new" / "m.onnx"
    arguments = ["--format", "onnx", "-o", str(out), "--features", "--tolerance", "0.5"]
    assert export.main([CLASSIFIER, str(weights[CLASSIFIER]), *arguments]) == 0
    [(task, name, format_name, options)] = calls
    assert (task, name, format_name) == ("classification", "m.onnx", "onnx")
    assert options == {
        "name": CLASSIFIER, "features": True, "with_preprocessing": False, "dtype": "float32",
        "calibration": [], "images": [], "tolerance": 0.5,
    }  # fmt: skip
    output = capsys.readouterr().out
    assert output.startswith(f"{out}: 7.2 MB\n")
    assert "2 x 3 x 32 x 40        logits    4.0e-07   1.0e-07   100.00%\n" in output
    assert "2 x 3 x 32 x 40        stage1    5.0e-07   2.0e-07   -\n" in output
    assert output.endswith("1 thread: eager 20.0 ms, exported 10.0 ms, ratio 2.00\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "m.pt2"], "output must end in .onnx for the format onnx, got m.pt2"),
        (["--tolerance", "0"], "--tolerance must be a positive number, got 0.0"),
        (["--tolerance", "nan"], "--tolerance must be a positive number, got nan"),
        (["--tolerance", "inf"], "--tolerance must be a positive number, got inf"),
        (["--images", "nowhere.png"], "--images not found: nowhere.png"),
        (["--images", "0"], "--images must be images or folders, got the camera 0"),
        (["--int8"], "--int8 and --calibration must be given together, got one of them"),
        (
            ["--int8", "--calibration", "x", "--tolerance", "1"],
            "--tolerance must not be given with --int8",
        ),
        (["m.onnx"], "-o must be another file than CHECKPOINT, got m.onnx for both"),
        (["-o", "folder.onnx"], "output must be a file, got the folder folder.onnx"),
        (
            ["--features", "--with-preprocessing"],
            "features and with_preprocessing must not be given together, got both",
        ),
        (["--calibration", "x"], "--int8 and --calibration must be given together"),
        (["--int8", "--calibration", "0"], "--calibration must be images or folders, got the cam"),
        (
            ["--dtype", "float16", "--features"],
            "float16 must be without features and preprocessing in the graph, got one of them",
        ),
        (
            ["--dtype", "bfloat16"],
            "the format must be torch-export or aoti for bfloat16, got onnx",
        ),
        (["--checkpoint"], "checkpoint must be given for flash_internimage_nano"),
    ],
)
def test_mistakes_are_one_line(options, message, tmp_path, monkeypatch, calls, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.onnx").mkdir()
    options = [option for option in options if option != "--checkpoint"]
    arguments = [CLASSIFIER, "--format", "onnx", "-o", "m.onnx", *options]
    assert export.main(arguments) == 2
    assert message in caplog.records[-1].getMessage()
    assert "\n" not in caplog.records[-1].getMessage()
    assert not calls


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [DETECTOR, "--format", "aoti"],
            "the task must be classification or segmentation for the format aoti, got detection",
        ),
        (
            [SEGMENTOR, "--format", "torch-export", "--dtype", "bfloat16"],
            "the task must be classification for bfloat16, got segmentation",
        ),
        (
            [SEGMENTOR, "--format", "torch-export", "--int8", "--calibration", "x"],
            "the task must be classification for int8, got segmentation",
        ),
    ],
)
def test_what_the_format_does_not_support_is_refused(arguments, message, tmp_path, calls, caplog):
    assert export.main([*arguments, "-o", str(tmp_path / "m.pt2")]) == 2
    assert caplog.records[-1].getMessage() == message
    assert not calls


def test_weights_of_another_file_are_not_replaced(tmp_path, monkeypatch, calls, caplog):
    monkeypatch.setattr(formats, "find_spec", lambda name: True)
    (tmp_path / "m.bin").write_text("precious")
    arguments = ["--format", "openvino", "-o", str(tmp_path / "m.xml")]
    assert export.main([CLASSIFIER, *arguments]) == 2
    assert "m.bin, which belongs to no m.xml" in caplog.records[-1].getMessage()
    assert not calls


def test_images_are_chosen_evenly(tmp_path, caplog):
    for name in "abcde":
        Image.new("RGB", (1, 1)).save(tmp_path / f"{name}.png")
    caplog.set_level("INFO")
    chosen = export._find([str(tmp_path)], "--calibration", 2)
    assert [source.path.name for source in chosen] == ["a.png", "c.png"]
    assert caplog.messages == ["2 of 5 images of --calibration are used"]


def test_the_agreement_of_int8_is_printed(tmp_path):
    assert "calibration images: 97.50% have the same class\n" in export._describe(
        Report(tmp_path, 7_200_000, [], [], agreement=0.975)
    )


def test_a_difference_is_exit_code_1(weights, tmp_path, monkeypatch, caplog):
    def fail(*_, **__):
        raise DifferenceError("logits must differ by less")

    monkeypatch.setattr(export, "export_model", fail)
    out = str(tmp_path / "new" / "m.onnx")
    assert export.main([CLASSIFIER, str(weights[CLASSIFIER]), "--format", "onnx", "-o", out]) == 1
    assert caplog.records[-1].getMessage() == "no file is written: logits must differ by less"
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("format", "extra"), [("onnx", "export"), ("openvino", "openvino")])
def test_a_missing_package_names_the_extra(format, extra, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    arguments = ["export", CLASSIFIER, "--format", format, "-o", str(tmp_path / "m.onnx")]
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    expected = f"requires {format}: pip install 'flash-internimage[{extra}]'\n"
    assert capsys.readouterr().err.endswith(expected)


@pytest.mark.parametrize("format", ["torch-export", "aoti"])
def test_int8_of_pytorch_requires_torchao(format, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name == "torchao" else name)
    options = ["--int8", "--calibration", "x", "-o", str(tmp_path / "m.pt2")]
    with pytest.raises(SystemExit, match="2"):
        main(["export", CLASSIFIER, "--format", format, *options])
    assert capsys.readouterr().err.endswith(
        "requires torchao: pip install 'flash-internimage[export]'\n"
    )
