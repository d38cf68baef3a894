"""Visualization backends that continue their run when training is resumed."""

from abc import abstractmethod
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.registry import VISBACKENDS
from mmengine.runner import Runner
from mmengine.visualization import BaseVisBackend

from ...nested import flatten
from ...tracking import open_tracker


class _RunBackend(BaseVisBackend):
    """Base of the backends: they record training, at iterations, and nothing else.

    mmengine records validations of epoch-based loops at epochs, and the times of training and
    validation under the same names.

    Args:
        save_dir: Folder of an attempt's logs, `<work dir>/<time>/vis_data`.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__(save_dir)
        self._runner: Runner | None = None
        self._writer: Any = None

    @property
    def experiment(self) -> Any:
        """The writer of the run; None before it starts."""
        return self._writer

    def _init_env(self) -> None:
        """Do nothing: :meth:`start` opens the writer."""

    def start(self, runner: Runner) -> None:
        """Start the run, or continue it if the runner was resumed.

        Raises:
            OSError: If a file cannot be written.
            ValueError: If the tracker cannot start.
        """
        self._writer = self._open(runner)
        self._runner = runner

    @abstractmethod
    def _open(self, runner: Runner) -> Any:
        """Return the writer of a run."""

    def add_config(self, config: Config, **kwargs: Any) -> None:
        """Do nothing: trackers get the config when the run starts."""

    def add_graph(self, model: Any, data_batch: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def add_image(self, name: str, image: np.ndarray, step: int = 0, **kwargs: Any) -> None:
        """Record an image, an (H, W, 3) uint8 array in RGB, while training."""
        if self._runner is not None:
            self._writer.add_image(name, image, self._runner.iter)

    def add_scalar(self, name: str, value: Any, step: int = 0, **kwargs: Any) -> None:
        """Record a scalar while training."""
        self.add_scalars({name: value}, step)

    def add_scalars(
        self, scalar_dict: dict, step: int = 0, file_path: str | None = None, **kwargs: Any
    ) -> None:
        """Record a row of scalars while training."""
        if self._runner is None:
            return
        row = {
            name: value.item() if hasattr(value, "item") else value
            for name, value in scalar_dict.items()
            if name not in ("iter", "epoch")
        }
        if "iter" not in scalar_dict:  # a validation
            step = self._runner.iter
            row = {f"val/{k}" if k in ("time", "data_time") else k: v for k, v in row.items()}
        self._log({k: v for k, v in row.items() if isinstance(v, int | float)}, step)

    @abstractmethod
    def _log(self, row: dict[str, float], step: int) -> None:
        """Record the scalars of a step."""

    def close(self) -> None:
        """Finish the run."""
        if self._writer is not None:
            self._writer.close()
        self._runner = self._writer = None


@VISBACKENDS.register_module()
class RunTensorboardVisBackend(_RunBackend):
    """Writes `<work dir>/tensorboard`, one chart over all attempts of a run.

    Args:
        save_dir: Folder of an attempt's logs, `<work dir>/<time>/vis_data`.
    """

    def _open(self, runner: Runner) -> Any:
        from ...tracking.events import Events  # needs tensorboard

        # TensorBoard hides the steps that this attempt repeats.
        return Events(Path(runner.work_dir, "tensorboard"), purge_step=runner.iter + 1)

    def _log(self, row: dict[str, float], step: int) -> None:
        self._writer.add(row, step)


@VISBACKENDS.register_module()
class RunTrackerVisBackend(_RunBackend):
    """Records a run with Weights & Biases or MLflow; see :class:`~.tracking.Tracker`.

    Args:
        save_dir: Folder of an attempt's logs, `<work dir>/<time>/vis_data`.
        tracker: 'wandb' or 'mlflow'.
    """

    def __init__(self, save_dir: str, tracker: str) -> None:
        super().__init__(save_dir)
        self.tracker = tracker

    def _open(self, runner: Runner) -> Any:
        settings = flatten(runner.cfg.to_dict())
        return open_tracker(self.tracker, Path(runner.work_dir), settings, resumed=runner.iter > 0)

    def _log(self, row: dict[str, float], step: int) -> None:
        self._writer.log(row, step)


def start_backends(runner: Runner) -> None:
    """Start the backends of a runner that record its training; only the main process has any.

    Raises:
        OSError: If a file cannot be written.
        ValueError: If a tracker cannot start.
    """
    for backend in _backends(runner):
        backend.start(runner)


def close_backends(runner: Runner) -> None:
    """Close the backends that :func:`start_backends` has started."""
    with ExitStack() as stack:  # all of them, even if one cannot be closed
        for backend in _backends(runner):
            stack.callback(backend.close)


def _backends(runner: Runner) -> list[_RunBackend]:
    backends = runner.visualizer._vis_backends.values() if is_main_process() else ()
    return [backend for backend in backends if isinstance(backend, _RunBackend)]
