"""Former name of `classification.test`, kept for one release."""

import logging
import sys

from timm.utils.distributed import world_info_from_env

from flash_internimage.classification.cli.test import main
from flash_internimage.console import log_to_terminal

_logger = logging.getLogger(__name__)

if __name__ == "__main__":
    log_to_terminal()
    if world_info_from_env()[1] == 0:
        _logger.warning("classification.validate is deprecated: use python -m classification.test")
    sys.exit(main())
