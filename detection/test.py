"""Evaluate a detector.

Example::

    python -m detection.test CONFIG CHECKPOINT
"""

from flash_internimage.openmmlab.cli.detection import get_parser, get_runner, main

__all__ = ["get_parser", "get_runner", "main"]

if __name__ == "__main__":
    main()
