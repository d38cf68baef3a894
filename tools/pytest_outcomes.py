"""Pytest plugin that writes the outcome of each test to a file as soon as it is known.

python -m pytest -p tools.pytest_outcomes --outcomes FILE

Each line of the file is a JSON object, so the file is useful even if the run is killed.
"""

import json
from pathlib import Path

import pytest


class Outcomes:
    """Append a line for each test that ran, and for each module that could not be collected."""

    def __init__(self, file: Path) -> None:
        self.file = file.open("w", buffering=1)  # line-buffered

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write a test's outcome, except those of a set-up or teardown that passed."""
        if report.when == "call" or not report.passed:
            self._write(report, report.duration)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Write a module that failed to import, or that is skipped as a whole."""
        if not report.passed:
            self._write(report, 0.0)

    def _write(self, report: pytest.TestReport | pytest.CollectReport, seconds: float) -> None:
        line = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": round(seconds, 3),
            "message": _message(report),
        }
        self.file.write(json.dumps(line) + "\n")


def _message(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return the first line of the error, or the reason for skipping."""
    if isinstance(report.longrepr, tuple):  # skipped: file, line, reason
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = (crash.message if crash else report.longreprtext).strip().splitlines()
    if crash is None:
        lines.reverse()  # the last line of the traceback of an import error
    return lines[0] if lines else ""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option for the file."""
    parser.addoption("--outcomes", type=Path, metavar="FILE", help="file of the tests' outcomes")


def pytest_configure(config: pytest.Config) -> None:
    """Start writing, if the option is given."""
    if file := config.getoption("outcomes"):
        config.pluginmanager.register(Outcomes(file))
