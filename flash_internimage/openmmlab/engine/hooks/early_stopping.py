"""Early stopping that continues where it was in resumed runs."""

from collections.abc import Mapping
from numbers import Real
from typing import Any

from mmengine.hooks import EarlyStoppingHook, EMAHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

_STATE = "early_stopping"


@HOOKS.register_module()
class ResumableEarlyStoppingHook(EarlyStoppingHook):
    """mmengine's EarlyStoppingHook, whose best score and patience are part of checkpoints.

    mmengine's own hook forgets them, so that a run that is stopped and resumed trains for longer. A
    run that was stopped early stops again when it is resumed, unless its patience is higher.

    Args:
        args: Arguments of EarlyStoppingHook.
        kwargs: Keyword arguments of EarlyStoppingHook.

    Example::

        custom_hooks = [
            dict(
                type='ResumableEarlyStoppingHook',
                monitor='coco/bbox_mAP',
                patience=5,
                min_delta=0.001,
            )
        ]
    """

    priority = "LOW"  # before the checkpoint hook, which saves the state

    def before_train(self, runner: Runner) -> None:
        """Restore the state of a resumed run, and stop it if its patience is exhausted."""
        state = runner.message_hub.runtime_info.get(_STATE)
        if not self._is_own(state):
            return
        averages = _averages(runner)
        # Checkpoints of earlier versions lack the entry.
        if state.get("averages", averages) != averages:
            runner.logger.warning(
                "early stopping counts from 0: the validated weights are %s an EMA",
                "now those of" if averages else "no longer those of",
            )
            return
        self.best_score, self.wait_count = state["best"], state["waited"]
        if self.wait_count >= self.patience:
            runner.train_loop.stop_training = True
            runner.logger.info(
                "stopped early: %s has not improved for %d validations",
                self.monitor, self.wait_count,
            )  # fmt: skip

    def after_val_epoch(self, runner: Runner, metrics: dict) -> None:
        """Decide whether to stop, and record the state for the next checkpoint."""
        super().after_val_epoch(runner, metrics)
        state = {"best": float(self.best_score), "waited": self.wait_count, **self._compared()}
        state["averages"] = _averages(runner)
        runner.message_hub.update_info(_STATE, state)

    def _compared(self) -> dict[str, str]:
        return {"monitor": self.monitor, "rule": self.rule}

    def _is_own(self, state: Any) -> bool:
        """Return whether a state of a checkpoint is valid and counted the same metric."""
        return (
            isinstance(state, Mapping)
            and all(state.get(key) == value for key, value in self._compared().items())
            and isinstance(state.get("best"), Real)
            and type(state.get("waited")) is int
        )


def _averages(runner: Runner) -> bool:
    """Return whether a run validates an average of its weights."""
    return any(isinstance(hook, EMAHook) for hook in runner.hooks)
