"""Read, download and convert checkpoints."""

from .conversion import (
    convert_checkpoint,
    convert_file,
    convert_state_dict,
    to_published_checkpoint,
    to_published_state_dict,
)
from .downloads import download
from .from_internimage import Transfer, load_internimage
from .loading import (
    check_optimizer,
    fetch_checkpoint,
    is_remote,
    load_checkpoint,
    released_classifiers,
    save_atomically,
)
from .safe_load import Placeholder
from .weights import (
    check_finite,
    check_state_dict,
    clean_state_dict,
    find_mismatches,
    is_finite,
    load_weights,
    read_pretrained,
)
from .zoo import Entry, read_zoo

__all__ = [
    "Entry",
    "Placeholder",
    "Transfer",
    "check_finite",
    "check_optimizer",
    "check_state_dict",
    "clean_state_dict",
    "convert_checkpoint",
    "convert_file",
    "convert_state_dict",
    "download",
    "fetch_checkpoint",
    "find_mismatches",
    "is_finite",
    "is_remote",
    "load_checkpoint",
    "load_internimage",
    "load_weights",
    "read_pretrained",
    "read_zoo",
    "released_classifiers",
    "save_atomically",
    "to_published_checkpoint",
    "to_published_state_dict",
]
