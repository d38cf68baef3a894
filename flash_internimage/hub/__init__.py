"""Publish models on the Hugging Face Hub, with config and model card."""

from .card import Facts, Result, Target
from .classifier import save_classifier
from .push import push
from .results import read_results
from .upload import check_repository, upload_folder

__all__ = [
    "Facts",
    "Result",
    "Target",
    "check_repository",
    "push",
    "read_results",
    "save_classifier",
    "upload_folder",
]
