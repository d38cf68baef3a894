"""`python -m flash_internimage`, the same as the console program `flash-internimage`."""

import sys

from flash_internimage_cli import main

if __name__ == "__main__":
    sys.exit(main(program="python -m flash_internimage"))
