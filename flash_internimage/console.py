"""The log of the programs on the terminal."""

import logging


class _Formatter(logging.Formatter):
    """Format errors as argparse does."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        prefix = "error:" if record.levelno == logging.ERROR else record.levelname
        return f"{prefix} {record.message}"


def log_to_terminal() -> None:
    """Print the log to stderr, unless a handler exists: `INFO ...`, `WARNING ...`, `error: ...`."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter())
    logging.basicConfig(handlers=[handler], level=logging.INFO)
