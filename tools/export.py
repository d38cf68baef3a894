"""`flash-internimage export`, in a checkout.

python -m tools.export NAME|CONFIG [CHECKPOINT] --format onnx|torch-export|aoti -o OUT
"""

import sys

from flash_internimage import extras

PROGRAM = "python -m tools.export"


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code."""
    with extras.required_by(PROGRAM):
        from flash_internimage.cli import export

        return export.main(argv, PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
