"""Evaluate a classifier or measure its throughput.

Example:
    python -m classification.test MODEL|CONFIG [key=value ...] --checkpoint FILE --data DIR
    torchrun --nproc-per-node 8 -m classification.test MODEL|CONFIG --checkpoint FILE --data DIR
"""

import sys

from flash_internimage.classification.cli.test import main

if __name__ == "__main__":
    sys.exit(main())
