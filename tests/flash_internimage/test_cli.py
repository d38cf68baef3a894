"""Tests of the console program flash-internimage."""

import importlib
import subprocess
import sys
from importlib import metadata

import pytest

from flash_internimage.cli import test as test_command
from flash_internimage.configs import find_config
from flash_internimage.extras import EXTRAS, required_by
from flash_internimage_cli import COMMANDS, main

DIGITS = "flash_internimage_nano_digits"


@pytest.fixture
def exits(capsys):
    """Return a function that runs a command that exits, and returns its output."""

    def exits(*arguments, code, program="flash-internimage") -> str:
        with pytest.raises(SystemExit) as exit:
            main(list(arguments), program)
        assert exit.value.code == code
        output = capsys.readouterr()
        return output.err if code else output.out

    return exits


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["trian"], []])
def test_help_version_and_unknown_commands_do_not_import_torch(arguments):
    code = (
        "import atexit, sys, flash_internimage_cli\n"
        "atexit.register(lambda: print('torch' in sys.modules))\n"
        f"flash_internimage_cli.main({arguments})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert done.returncode == (0 if arguments and arguments[0].startswith("-") else 2)


def test_help_lists_every_command(exits):
    listed = exits("--help", code=0)
    assert all(f"    {name}" in listed for name in COMMANDS)


def test_version_is_that_of_the_distribution(exits):
    version = metadata.version("flash-internimage")
    assert exits("--version", code=0) == f"flash-internimage {version}\n"


def test_an_unknown_command_is_an_error_with_the_choices(exits):
    message = exits("trian", code=2)
    assert "invalid choice: 'trian'" in message
    assert all(name in message for name in COMMANDS)
    assert "COMMAND" in exits(code=2)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("program", ["flash-internimage", "python -m flash_internimage"])
def test_usage_names_the_program_and_the_command(command, program, exits):
    usage = exits(command, "--help", code=0, program=program)
    assert usage.startswith(f"usage: {program} {command} [-h]")


@pytest.mark.parametrize(
    ("command", "config", "options"),
    [
        ("train", DIGITS, ["key=value", "--resume"]),
        ("test", DIGITS, ["key=value", "--throughput"]),
        ("test", "flash_internimage_tiny.in1k", ["key=value", "--throughput"]),
    ],
)
def test_the_config_of_a_classifier_selects_its_options(command, config, options, exits):
    usage = exits(command, config, "--help", code=0)
    assert usage.startswith(f"usage: flash-internimage {command} [-h]")
    assert all(option in usage for option in options)


MASK_RCNN = "mask_rcnn_flash_internimage_nano_fpn_digits_scenes"
UPERNET = "upernet_flash_internimage_nano_digits_scenes"


@pytest.mark.mm
@pytest.mark.parametrize(
    ("command", "config", "option", "other"),
    [
        ("train", MASK_RCNN, "--auto-scale-lr", "--tta"),
        ("test", MASK_RCNN, ".pkl", "--tta"),
        ("test", UPERNET, "--tta", ".pkl"),
    ],
)
def test_the_config_of_openmmlab_selects_its_options(command, config, option, other, exits):
    usage = exits(command, config, "--help", code=0)
    assert f"usage: flash-internimage {command} [-h]" in usage
    assert option in usage
    assert other not in usage


@pytest.mark.mm
def test_a_config_without_a_task_cannot_be_tested(exits, tmp_path):
    (tmp_path / "config.py").write_text("default_scope = 'mmpose'")
    message = exits("test", str(tmp_path / "config.py"), "x.pth", code=2)
    assert message == "error: default_scope must be 'mmdet' or 'mmseg', got 'mmpose'\n"
    (tmp_path / "config.py").write_text("default_scope =")
    message = exits("test", str(tmp_path / "config.py"), "x.pth", code=2)
    assert message.startswith(f"error: config {tmp_path}/config.py cannot be read: SyntaxError")


@pytest.mark.parametrize("command", ["train", "test"])
def test_a_missing_config_is_one_line(command, exits, tmp_path):
    message = exits(command, "flash_internimage_nano_digit", code=2)
    assert message.startswith("error: config not found: flash_internimage_nano_digit; similar")
    assert message.count("\n") == 1
    (tmp_path / "config.json").write_text("{}")
    message = exits(command, str(tmp_path / "config.json"), code=2)
    assert message.startswith("error: CONFIG must end in .yaml, .yml or .py, got")
    assert "CONFIG" in exits(command, "--resume", code=2)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a/best.pth", "--limit", "5"], ["--checkpoint", "a/best.pth", "--limit", "5"]),
        (["lr=1.pth"], ["--checkpoint", "lr=1.pth"]),  # a file
        (["data.crop_pct=0.9"], ["data.crop_pct=0.9"]),
        (["--checkpoint", "a.pth"], ["--checkpoint", "a.pth"]),
        ([], []),
    ],
)
def test_the_checkpoint_of_a_classifier_may_follow_the_config(
    arguments, expected, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1.pth").touch()
    called = []
    module = importlib.import_module("flash_internimage.classification.cli.test")
    monkeypatch.setattr(module, "main", lambda *arguments: called.append(arguments) or 0)
    assert main(["test", DIGITS, *arguments]) == 0
    assert called == [([str(find_config(DIGITS)), *expected], "flash-internimage test")]


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_missing_extra_is_named(extra, exits, monkeypatch):
    def import_the_extra(*_):
        importlib.import_module(EXTRAS[extra][0])

    monkeypatch.setitem(sys.modules, EXTRAS[extra][0], None)
    monkeypatch.setattr(test_command, "main", import_the_extra)
    assert exits("test", DIGITS, code=2) == (
        f"error: flash-internimage test requires {EXTRAS[extra][0]}: "
        f"pip install 'flash-internimage[{extra}]'\n"
    )


def test_other_missing_modules_are_not_attributed_to_an_extra():
    with pytest.raises(ModuleNotFoundError), required_by("program"):
        raise ModuleNotFoundError(name="mmcv._ext")


def test_an_interruption_is_one_line(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(test_command, "main", interrupt)
    assert main(["test", DIGITS]) == 130
    assert capsys.readouterr().err == "flash-internimage test: interrupted\n"
