"""`flash-internimage dataset`, in a checkout.

python -m tools.dataset convert|check|config ...
"""

import sys

from flash_internimage import extras

PROGRAM = "python -m tools.dataset"


def main(argv: list[str] | None = None) -> int:
    """Run a command and return the exit code."""
    with extras.required_by(PROGRAM):
        from flash_internimage.cli import dataset

        return dataset.main(argv, PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
