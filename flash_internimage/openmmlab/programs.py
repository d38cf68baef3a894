"""Former names of the command lines, kept for one release."""

from .cli.config import config_of as _load_config  # noqa: F401
from .cli.train import training_parser  # noqa: F401
from .engine.runner.checkpoint_names import latest_checkpoint  # noqa: F401
