"""The models that an own dataset can be trained with: shipped configs and released weights."""

import difflib
import re
from pathlib import PurePosixPath
from typing import NamedTuple

from ..checkpoints.zoo import Task, read_zoo
from ..configs import configs_root, list_configs

_NAME = re.compile(
    r"(?P<family>[a-z0-9_]+?)(-4scale)?_(?P<flash>flash_)?internimage_(?P<size>[a-z]+)_.*"
)
_BATCH = re.compile(r"# \d+ GPUs x (\d+) image")
_NANO_BATCH = 8  # of the demos, which run on one CPU


class Model(NamedTuple):
    """A shipped config of mmdet or mmseg.

    Attributes:
        name: Short name, such as `mask_rcnn-t` or, with InternImage, `mask_rcnn-internimage-t`.
        family: Architecture, such as `mask_rcnn`.
        config: Name of the config, such as `detection/mask_rcnn_flash_...py`.
        weights: Address of the released weights; None for the demos.
        batch_size: Images per GPU.
    """

    name: str
    family: str
    config: str
    weights: str | None
    batch_size: int

    @property
    def is_demo(self) -> bool:
        """Whether the model is one of the demos, without released weights."""
        return self.weights is None


def list_base_models(task: Task) -> dict[str, Model]:
    """Return the models of a task by their short names; of several schedules, the shortest."""
    weights = {f"{entry.config}": entry.addresses[0] for entry in read_zoo().values()}
    models: dict[str, Model] = {}
    for config in sorted(list_configs(f"{task}/*.py")):
        parts = _NAME.fullmatch(PurePosixPath(config).stem)
        if parts is None:
            continue
        backbone = "" if parts["flash"] else "internimage-"
        name = f"{parts['family']}-{backbone}{parts['size']}"
        text = (configs_root() / "configs" / config).read_text()
        batch = _BATCH.match(text)
        model = Model(
            name,
            parts["family"],
            config,
            weights.get(f"configs/{config}"),
            int(batch[1]) if batch else _NANO_BATCH,
        )
        models.setdefault(name, model)
    return models


def find_base_model(name: str, task: Task) -> Model:
    """Return a model by its short name.

    Raises:
        ValueError: If there is no such model for the task.
    """
    models = list_base_models(task)
    if name in models:
        return models[name]
    close = difflib.get_close_matches(name, models, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ValueError(f"--model must be one of {', '.join(sorted(models))}, got {name}{hint}")
