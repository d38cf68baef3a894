"""Tests of the command complexity."""

import pytest

from flash_internimage.cli import complexity
from tools import complexity as tool

NANO = "flash_internimage_nano"


def test_one_line_for_each_model(capsys):
    assert tool.main([NANO, "flash_internimage_nano_digits", "--size", "32", "48"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["model", "image", "parameters"]
    assert [row.split()[:4] for row in rows] == [
        [name, "32", "x", "48"] for name in (NANO, "flash_internimage_nano_digits")
    ]


def test_markdown(capsys):
    assert complexity.main([NANO, "--size", "32", "32", "--markdown"]) == 0
    head, rule, row = capsys.readouterr().out.splitlines()
    assert (head.count("|"), rule.count("---"), row.count("|")) == (8, 7, 8)
    assert row.startswith(f"| {NANO} | 32 x 32 | 2.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the models must be NAME|CONFIG... or --all, got nothing"),
        ([NANO, "--all"], f"the models must be NAME|CONFIG... or --all, got {NANO} --all"),
        ([NANO, "--size", "0", "32"], "--size must be two positive numbers, got 0 32"),
        ([NANO, "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        ([NANO, "unknown.yaml"], "unknown.yaml"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    assert complexity.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
