"""Training curves, drawn from the scalars that mmengine's LocalVisBackend writes."""

from pathlib import Path

from matplotlib.figure import Figure
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ....files import write_atomically
from ....scalars import read_scalars


@HOOKS.register_module()
class CurvesHook(Hook):
    """Draw `curves.png` in the work folder after every validation and at the end of training."""

    priority = "LOWEST"

    _drawn: int | None = None  # iteration

    @master_only
    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Draw the curves."""
        save_curves(Path(runner.work_dir))
        self._drawn = runner.iter

    @master_only
    def after_train(self, runner: Runner) -> None:
        """Draw the curves, unless the training ended with a validation."""
        if self._drawn != runner.iter:
            save_curves(Path(runner.work_dir))


def save_curves(work_dir: Path) -> None:
    """Draw the losses, learning rate and metrics of a run to `work_dir/curves.png`."""
    scalars = read_scalars(work_dir)
    panels = {
        "losses": [name for name in scalars if name.split(".")[-1].startswith("loss")],
        "learning rate": [name for name in scalars if name == "lr"],
        "metrics": [name for name in scalars if "/" in name or name in ("mIoU", "mAcc", "aAcc")],
    }
    panels = {title: names for title, names in panels.items() if names}
    if not panels:
        return
    figure = Figure(figsize=(6 * len(panels), 4), layout="constrained")
    for axis, (title, names) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        for name in names:
            steps, values = zip(*sorted(scalars[name].items()), strict=True)
            label = name.replace("$", r"\$")  # Keep matplotlib from parsing mathtext.
            axis.plot(steps, values, label=label, linewidth=2 if name == "loss" else 1)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="x-small")
    write_atomically(
        work_dir / "curves.png", lambda file: figure.savefig(file, dpi=120, format="png")
    )
