"""`flash-internimage visualize`, in a checkout.

python -m tools.visualize NAME|CONFIG [CHECKPOINT] IMAGE --layer LAYER --pixel X,Y -o OUT.png
"""

import sys

from flash_internimage import extras

PROGRAM = "python -m tools.visualize"


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code."""
    with extras.required_by(PROGRAM):
        from flash_internimage.cli import visualize

        return visualize.main(argv, PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
