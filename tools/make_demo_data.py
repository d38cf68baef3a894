"""Former name of `flash-internimage demo-data`, kept for one release."""

import sys

from flash_internimage.cli.demo_data import (
    main,
    write_digits,
    write_digits_scenes,
    write_digits_scenes_ade20k,
)

__all__ = ["write_digits", "write_digits_scenes", "write_digits_scenes_ade20k"]

if __name__ == "__main__":
    sys.exit(main(program="python -m tools.make_demo_data"))
