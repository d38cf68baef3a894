"""Test the commands of the console program in a checkout."""

import importlib
import sys

import pytest

from flash_internimage import extras


@pytest.mark.parametrize("name", ["analyze", "app", "dataset", "predict", "visualize"])
def test_a_missing_extra_is_named(name, monkeypatch, capsys):
    script = importlib.import_module(f"tools.{name}")
    command = f"flash_internimage.cli.{name}"
    monkeypatch.delattr(command, raising=False)
    monkeypatch.setitem(sys.modules, command, None)  # importing it fails
    monkeypatch.setitem(extras.EXTRAS, "train", (command,))
    with pytest.raises(SystemExit, match="2"):
        script.main([])
    expected = (
        f"error: python -m tools.{name} requires {command}: "
        "pip install 'flash-internimage[train]'\n"
    )
    assert capsys.readouterr().err == expected
