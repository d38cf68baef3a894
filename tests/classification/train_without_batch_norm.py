"""Run classification.train with models without batch norm."""

import sys

from flash_internimage.classification import state
from flash_internimage.classification.cli.train import main
from tests.classification.helpers import without_batch_norm

state.build_model = without_batch_norm(state.build_model)
sys.exit(main())
