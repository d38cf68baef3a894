"""Tests of the command export; the files are tested with the package."""

import pytest

from flash_internimage.cli import export
from flash_internimage.export import Comparison, DifferenceError, Report, Timing, formats
from flash_internimage_cli import main
from tests.nano import CLASSIFIER, SEGMENTOR


@pytest.fixture
def calls(monkeypatch):
    """Replace the export, and return its arguments."""
    calls = []

    def export_model(predictor, path, *arguments, **options):
        calls.append((predictor.task, path.name, *arguments, options))
        comparison = Comparison((2, 3, 32, 40), {"logits": 4e-7}, {"logits": 1e-7}, 1.0)
        return Report(path, 7_200_000, [comparison], [Timing(1, 0.02, 0.01)])

    monkeypatch.setattr(export, "export_model", export_model)
    return calls


def test_options_reach_the_function_and_the_report_is_printed(weights, tmp_path, calls, capsys):
    out = tmp_path / "new" / "m.onnx"
    arguments = ["--format", "onnx", "-o", str(out), "--features", "--tolerance", "0.5"]
    assert export.main([CLASSIFIER, str(weights[CLASSIFIER]), *arguments]) == 0
    [(task, name, format_name, options)] = calls
    assert (task, name, format_name) == ("classification", "m.onnx", "onnx")
    assert options == {
        "name": CLASSIFIER, "features": True, "with_preprocessing": False, "images": [],
        "tolerance": 0.5,
    }  # fmt: skip
    output = capsys.readouterr().out
    assert output.startswith(f"{out}: 7.2 MB\n")
    assert "2 x 3 x 32 x 40        logits    4.0e-07   1.0e-07   100.00%\n" in output
    assert output.endswith("1 thread: eager 20.0 ms, exported 10.0 ms, ratio 2.00\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "m.pt2"], "output must end in .onnx for the format onnx, got m.pt2"),
        (["--tolerance", "0"], "--tolerance must be above 0, got 0.0"),
        (["--tolerance", "nan"], "--tolerance must be above 0, got nan"),
        (["--images", "nowhere.png"], "INPUT not found: nowhere.png"),
        (["--images", "0"], "--images must be images or folders, got the camera 0"),
        (["--checkpoint"], "checkpoint must be given for flash_internimage_nano"),
    ],
)
def test_mistakes_are_one_line(options, message, tmp_path, monkeypatch, calls, caplog):
    monkeypatch.chdir(tmp_path)
    options = [option for option in options if option != "--checkpoint"]
    arguments = [CLASSIFIER, "--format", "onnx", "-o", "m.onnx", *options]
    assert export.main(arguments) == 2
    assert message in caplog.records[-1].getMessage()
    assert "\n" not in caplog.records[-1].getMessage()
    assert not calls


def test_a_model_that_the_format_does_not_support_is_refused(tmp_path, calls, caplog):
    arguments = [SEGMENTOR, "--format", "aoti", "-o", str(tmp_path / "m.pt2")]
    assert export.main(arguments) == 2
    expected = "the task must be classification for the format aoti, got segmentation"
    assert caplog.records[-1].getMessage() == expected
    assert not calls


def test_a_difference_is_exit_code_1(weights, tmp_path, monkeypatch, caplog):
    def fail(*_, **__):
        raise DifferenceError("logits must differ by less")

    monkeypatch.setattr(export, "export_model", fail)
    out = str(tmp_path / "m.onnx")
    assert export.main([CLASSIFIER, str(weights[CLASSIFIER]), "--format", "onnx", "-o", out]) == 1
    assert caplog.records[-1].getMessage() == "no file is written: logits must differ by less"


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    arguments = ["export", CLASSIFIER, "--format", "onnx", "-o", str(tmp_path / "m.onnx")]
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    expected = "requires onnx: pip install 'flash-internimage[export]'\n"
    assert capsys.readouterr().err.endswith(expected)
