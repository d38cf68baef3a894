"""`flash-internimage zoo`, and the command that updates the documents made from the zoo.

python -m tools.zoo list|info|download|convert|evaluate|push ...
python -m tools.zoo generate
"""

import argparse
import sys

from flash_internimage import extras
from flash_internimage.checkpoints.zoo import Entry
from flash_internimage.cli import zoo
from tools.zoo_documents import documents

PROGRAM = "python -m tools.zoo"


def _generate(entries: dict[str, Entry], arguments: argparse.Namespace) -> None:
    for path, text in documents(entries).items():
        path.write_text(text)
        sys.stdout.write(f"{path}\n")


def main(argv: list[str] | None = None) -> int:
    """Run a command and return the exit code."""
    generate = "generate", "update README.md and OpenMMLab's metafiles", _generate
    with extras.required_by(PROGRAM):
        return zoo.main(argv, PROGRAM, [generate])


if __name__ == "__main__":
    sys.exit(main())
