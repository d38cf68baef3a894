"""`flash-internimage app`, in a checkout.

python -m tools.app [MODEL...] [--host ADDRESS] [--port PORT]
"""

import sys

from flash_internimage import extras

PROGRAM = "python -m tools.app"


def main(argv: list[str] | None = None) -> int:
    """Serve the page and return the exit code."""
    with extras.required_by(PROGRAM):
        from flash_internimage.cli import app

        return app.main(argv, PROGRAM)


if __name__ == "__main__":
    sys.exit(main())
