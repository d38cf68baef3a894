"""Record the scalars of training runs in TensorBoard, Weights & Biases and MLflow."""

from .trackers import TRACKERS, MLflowTracker, Tracker, WandbTracker, check_packages, open_tracker

__all__ = [
    "TRACKERS",
    "MLflowTracker",
    "Tracker",
    "WandbTracker",
    "check_packages",
    "open_tracker",
]
