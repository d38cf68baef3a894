"""Evaluate a segmentor.

Example::

    python -m segmentation.test CONFIG CHECKPOINT [--tta]
"""

from flash_internimage.openmmlab.cli.segmentation import get_parser, get_runner, main

__all__ = ["get_parser", "get_runner", "main"]

if __name__ == "__main__":
    main()
