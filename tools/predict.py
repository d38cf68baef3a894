"""`flash-internimage predict`, in a checkout.

python -m tools.predict NAME|CONFIG [CHECKPOINT] INPUT... -o OUT
"""

import sys

from flash_internimage import extras

PROGRAM = "python -m tools.predict"


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code."""
    with extras.required_by(PROGRAM):
        from flash_internimage.cli import predict

        return predict.main(argv, PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
