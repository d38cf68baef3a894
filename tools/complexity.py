"""`flash-internimage complexity`, in a checkout.

python -m tools.complexity NAME|CONFIG... [--size H W] [--batch-size N] [--markdown]
"""

import sys

from flash_internimage import extras

PROGRAM = "python -m tools.complexity"


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code."""
    with extras.required_by(PROGRAM):
        from flash_internimage.cli import complexity

        return complexity.main(argv, PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
