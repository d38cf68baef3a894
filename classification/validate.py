"""Former name of `classification.test`, kept for one release."""

import logging
import sys

from timm.utils.distributed import world_info_from_env

from flash_internimage.classification.cli.test import main

_logger = logging.getLogger(__name__)

if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    if world_info_from_env()[1] == 0:
        _logger.warning("classification.validate is deprecated: use python -m classification.test")
    sys.exit(main())
