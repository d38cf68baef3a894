"""Train a classifier.

Example:
    python -m classification.train CONFIG.yaml [key=value ...] [--resume auto|FILE]
    torchrun --nproc-per-node 8 -m classification.train CONFIG.yaml
"""

import sys

from flash_internimage.classification.cli.train import main
from flash_internimage.classification.config import load_config
from flash_internimage.classification.engine import Trainer

__all__ = ["Trainer", "load_config", "main"]

if __name__ == "__main__":
    sys.exit(main())
