"""`flash-internimage convert-backbone`, in a checkout.

python -m tools.convert_backbone INTERNIMAGE_CHECKPOINT OUTPUT [--model NAME] [-v]
"""

import sys

from flash_internimage import extras

PROGRAM = "python -m tools.convert_backbone"


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code."""
    with extras.required_by(PROGRAM):
        from flash_internimage.cli import convert_backbone

        return convert_backbone.main(argv, PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
