"""`flash-internimage analyze`, for a checkout.

python -m tools.analyze NAME|CONFIG [CHECKPOINT] -o FOLDER ...
python -m tools.analyze runs RUN... -o curves.png
"""

import sys

from flash_internimage.cli import extras
from flash_internimage.cli.analyze import main

PROGRAM = "python -m tools.analyze"

if __name__ == "__main__":
    with extras.required_by(PROGRAM):
        sys.exit(main(program=PROGRAM))
