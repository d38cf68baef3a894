"""Weights & Biases and MLflow: a resumed run continues, and no step is recorded twice."""

import importlib.util
import json
import logging
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..checkpoints.downloads import hide_secrets
from ..files import write_text

_logger = logging.getLogger(__name__)


class Tracker(ABC):
    """A run of an experiment tracker.

    The output folder contains the id of the run and the last step of each scalar. If an attempt is
    killed, the next one repeats the steps since its checkpoint, which are not recorded again.

    Args:
        folder: Output folder of the run, which names it.
        settings: Settings of the run.
        resumed: Continue the run that is recorded in the folder, if there is one.

    Raises:
        ValueError: If the tracker cannot start, for example for want of an API key.
    """

    name: str
    _run: Any = None  # the run of the package, once it has started

    def __init__(self, folder: Path, settings: Mapping[str, Any], resumed: bool) -> None:
        self.folder = folder
        self._path = folder / f"{self.name}.json"
        state = _read(self._path) if resumed else {}
        self._before: dict[str, int] = dict(state.get("steps", {}))  # of earlier attempts
        self._steps = dict(self._before)
        try:
            self.run_id = self._start(state.get("run_id"), settings)
        except Exception as error:  # of the package
            self._close_after(error)
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"loggers: {self.name} cannot start: {reason:.500}") from error
        try:
            self._save()
        except OSError as error:
            self._close_after(error)
            raise

    @abstractmethod
    def _start(self, run_id: str | None, settings: Mapping[str, Any]) -> str:
        """Start a run, or continue the one with an id; return the id."""

    @abstractmethod
    def _log(self, scalars: dict[str, float], step: int) -> None: ...

    @abstractmethod
    def add_image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Record an image, an (H, W, 3) uint8 array in RGB."""

    @abstractmethod
    def close(self) -> None:
        """Finish the run, as failed while an exception is being handled."""

    def _close_after(self, error: Exception) -> None:
        """Finish a run that an error has ended while it started; MLflow refuses a second one."""
        if self._run is None:
            return
        try:
            self.close()
        except Exception as second:  # of the package
            _logger.warning("%s cannot be closed after '%s': %s", self.name, error, second)

    def log(self, scalars: Mapping[str, Any], step: int) -> None:
        """Record the numbers in `scalars`, unless an earlier attempt has recorded the step."""
        new = {
            name: float(value)
            for name, value in scalars.items()
            if isinstance(value, int | float | np.number) and step > self._before.get(name, -1)
        }
        if new:
            self._log(new, step)
            self._steps |= dict.fromkeys(new, step)
            self._save()

    def _save(self) -> None:
        write_text(self._path, json.dumps({"run_id": self.run_id, "steps": self._steps}))


class WandbTracker(Tracker):
    """A run of Weights & Biases.

    Its environment variables apply, such as WANDB_PROJECT and WANDB_MODE=offline.
    """

    name = "wandb"

    def _start(self, run_id: str | None, settings: Mapping[str, Any]) -> str:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "flash-internimage"),
            name=os.environ.get("WANDB_NAME", self.folder.name),
            dir=os.environ.get("WANDB_DIR", self.folder),
            id=run_id,
            config=dict(settings),
            allow_val_change=True,
            resume="allow",
        )
        # W&B's own steps only increase, so that a resumed run could not continue them.
        self._run.define_metric("*", step_metric="step")
        return self._run.id

    def _log(self, scalars: dict[str, float], step: int) -> None:
        self._run.log({**scalars, "step": step})

    def add_image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Record an image, an (H, W, 3) uint8 array in RGB."""
        self._run.log({name: self._wandb.Image(pixels), "step": step})

    def close(self) -> None:
        """Finish the run, as failed while an exception is being handled."""
        self._run.finish(exit_code=int(sys.exception() is not None))


class MLflowTracker(Tracker):
    """A run of MLflow.

    Its environment variables apply, such as MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME. A
    server that cannot be reached during training is reported once and does not end the run.
    """

    name = "mlflow"

    def _start(self, run_id: str | None, settings: Mapping[str, Any]) -> str:
        import mlflow

        self._mlflow = mlflow
        self._lost = 0
        self._run = mlflow.start_run(run_id, run_name=None if run_id else self.folder.name)
        if run_id is None:  # the parameters of a run cannot be changed
            values = [(_mlflow_name(name), f"{value}"[:500]) for name, value in settings.items()]
            for start in range(0, len(values), 100):  # the limit of a request
                mlflow.log_params(dict(values[start : start + 100]))
        return self._run.info.run_id

    def _log(self, scalars: dict[str, float], step: int) -> None:
        metrics = {_mlflow_name(name): value for name, value in scalars.items()}
        self._try(self._mlflow.log_metrics, metrics, step=step, run_id=self.run_id)

    def add_image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Record an image, an (H, W, 3) uint8 array in RGB."""
        path = f"images/{_mlflow_name(name)}_{step}.png"
        self._try(self._mlflow.log_image, Image.fromarray(pixels), path)

    def _try(self, log: Any, *arguments: Any, **options: Any) -> None:
        try:
            log(*arguments, **options)
        except self._mlflow.MlflowException as error:
            self._lost += 1
            if self._lost == 1:
                _logger.warning("MLflow cannot record: %s", " ".join(str(error).split())[:500])

    def close(self) -> None:
        """Finish the run, as failed while an exception is being handled."""
        if self._lost:
            _logger.warning("MLflow could not record %d rows or images", self._lost)
        self._try(self._mlflow.end_run, "FAILED" if sys.exception() is not None else "FINISHED")


TRACKERS: dict[str, type[Tracker]] = {"wandb": WandbTracker, "mlflow": MLflowTracker}


def check_packages(names: Iterable[str]) -> None:
    """Check that the packages of trackers are installed.

    Raises:
        ValueError: If a name is unknown or its package is missing.
    """
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"loggers must be among {', '.join(TRACKERS)}, got {name!r}")
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"loggers: {name} requires a package: pip install {name}")


def open_tracker(name: str, folder: Path, settings: Mapping[str, Any], resumed: bool) -> Tracker:
    """Start a run of a tracker, or continue it; see :class:`Tracker`.

    Args:
        name: A key of `TRACKERS`.
        folder: Output folder of the run, which names it.
        settings: Settings of the run, flat; lists and other values become text. Passwords and query
            strings in URLs are left out.
        resumed: Continue the run that is recorded in the folder, if there is one.
    """
    public = {key: _public(value) for key, value in settings.items()}
    return TRACKERS[name](folder, public, resumed)


def _public(value: Any) -> bool | int | float | str | None:
    if value is None or isinstance(value, bool | int | float):
        return value
    return hide_secrets(value if isinstance(value, str) else repr(value))


def _read(path: Path) -> dict[str, Any]:
    """Return the state of a tracker; empty if there is none, with a warning if it is damaged."""
    if not path.exists():
        return {}
    try:
        state = json.loads(path.read_text())
        steps = {str(name): int(step) for name, step in state["steps"].items()}
        return {"run_id": str(state["run_id"]), "steps": steps}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        _logger.warning("%s is damaged: starting a new run", path)
        return {}


def _mlflow_name(name: str) -> str:
    """Return a name in which characters that MLflow rejects are replaced."""
    return re.sub(r"[^\w\-. /]", "_", name)
