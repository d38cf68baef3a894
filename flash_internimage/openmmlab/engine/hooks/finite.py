"""A hook that stops training when the loss or the weights are not finite."""

import math

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner


@HOOKS.register_module()
class CheckFiniteHook(Hook):
    """Stop training when the loss or weights are not finite, before they reach a checkpoint.

    Metrics that are not finite are logged as a warning.

    Raises:
        FloatingPointError: If the loss or weights are not finite.
    """

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Warn about metrics that are not finite."""
        wrong = [
            name
            for name, value in (metrics or {}).items()
            if isinstance(value, float) and not math.isfinite(value)
        ]
        if wrong:
            runner.logger.warning(
                "not finite: %s; the data may contain no such objects", ", ".join(wrong)
            )

    after_test_epoch = after_val_epoch

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Check the losses of an iteration."""
        losses = {name: value.item() for name, value in (outputs or {}).items() if "loss" in name}
        if not all(map(math.isfinite, losses.values())):
            values = ", ".join(f"{name} {value}" for name, value in losses.items())
            raise FloatingPointError(
                f"the loss is not finite in iteration {runner.iter + 1}: {values}. Resume from the "
                "last checkpoint with a lower learning rate, a longer warm-up or clip_grad"
            )

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Check the weights that are about to be saved."""
        weights = checkpoint["state_dict"].items()
        wrong = [name for name, tensor in weights if not tensor.isfinite().all()]
        if wrong:
            raise FloatingPointError(
                f"{len(wrong)} weights are not finite after iteration {runner.iter} and are not "
                f"saved: {', '.join(wrong[:10])}"
            )
