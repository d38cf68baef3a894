"""Read, download and convert checkpoints."""

from .conversion import (
    convert_checkpoint,
    convert_file,
    convert_state_dict,
    restore_checkpoint,
    restore_state_dict,
)
from .downloads import download
from .loading import check_optimizer, fetch_checkpoint, load_checkpoint, save_atomically
from .safe_load import Placeholder
from .weights import (
    clean_state_dict,
    find_misfits,
    is_finite,
    load_weights,
    read_pretrained,
    require_fit,
)
from .zoo import Entry, read_zoo

__all__ = [
    "Entry",
    "Placeholder",
    "check_optimizer",
    "clean_state_dict",
    "convert_checkpoint",
    "convert_file",
    "convert_state_dict",
    "download",
    "fetch_checkpoint",
    "find_misfits",
    "is_finite",
    "load_checkpoint",
    "load_weights",
    "read_pretrained",
    "read_zoo",
    "require_fit",
    "restore_checkpoint",
    "restore_state_dict",
    "save_atomically",
]
