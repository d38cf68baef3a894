"""Test the log of the programs on the terminal."""

import logging

from flash_internimage.console import log_to_terminal


def test_errors_look_like_those_of_argparse(capsys, monkeypatch):
    monkeypatch.setattr(logging, "root", logging.RootLogger(logging.WARNING))
    log_to_terminal()
    logging.root.info("3 of %d", 4)
    logging.root.error("x must be %s, got %s", 1, 2)
    assert capsys.readouterr().err == "INFO 3 of 4\nerror: x must be 1, got 2\n"
