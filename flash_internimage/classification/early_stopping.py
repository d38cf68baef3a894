"""Stop a run whose validation metric no longer improves."""

import math
from collections.abc import Mapping
from operator import index
from typing import Any

from .config import EarlyStopping


class Patience:
    """Counts the epochs since the last improvement of a validation metric.

    Args:
        options: Settings of early stopping.

    Attributes:
        best: Best value so far, None before the first epoch.
        waited: Number of epochs since.
    """

    def __init__(self, options: EarlyStopping) -> None:
        self.options = options
        self.best: float | None = None
        self.waited = 0

    @property
    def is_exhausted(self) -> bool:
        """Whether the run should stop."""
        return self.options.patience is not None and self.waited >= self.options.patience

    def update(self, row: Mapping[str, float]) -> None:
        """Count an epoch.

        Args:
            row: Metrics of the epoch, with those of the EMA weights if there are any.
        """
        metric = self.options.metric
        value = row.get(f"ema_{metric}", row[f"val_{metric}"])
        if self._improves(value):
            self.best, self.waited = value, 0
        else:
            self.waited += 1

    def _improves(self, value: float) -> bool:
        if not math.isfinite(value) or self.best is None:
            return math.isfinite(value)
        gain = self.best - value if self.options.metric == "loss" else value - self.best
        return gain > self.options.min_delta

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"metric": self.options.metric, "best": self.best, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state, unless it counted another metric."""
        if state["metric"] == self.options.metric:
            self.best = None if state["best"] is None else float(state["best"])
            self.waited = index(state["waited"])
