"""`flash-internimage analyze`, in a checkout.

python -m tools.analyze NAME|CONFIG [CHECKPOINT] -o FOLDER ...
python -m tools.analyze runs RUN... -o curves.png
"""

import sys

from flash_internimage import extras

PROGRAM = "python -m tools.analyze"


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code."""
    with extras.required_by(PROGRAM):
        from flash_internimage.cli import analyze

        return analyze.main(argv, PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
