"""Loading of published weights, whose parameters have other names."""

from collections.abc import Iterable, Mapping
from typing import Any

from mmengine.model import BaseModule
from torch import Tensor, nn

from ...checkpoints import convert_state_dict
from ..utils import log_warning


class LoadsPublishedWeights(BaseModule):
    """Base class of modules that can load published weights under their published names.

    Names are converted however the weights are loaded: by the inference functions of mmdet and
    mmseg, by `init_cfg`, or by PyTorch's `load_state_dict`. A warning counts the tensors that do
    not match.

    Attributes:
        published_prefix: Prefix of the module's parameter names in a whole model.
    """

    published_prefix = ""

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        names = [name for name in state_dict if name.startswith(prefix)]
        published = {
            self.published_prefix + name.removeprefix(prefix): state_dict.pop(name)
            for name in names
        }
        for name, tensor in convert_state_dict(published).items():
            state_dict[prefix + name.removeprefix(self.published_prefix)] = tensor
        warn_of_mismatches(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def warn_of_mismatches(module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str) -> None:
    """Warn about tensors that are missing, unexpected or of another shape.

    Tensors of a backbone within the module are not considered.

    Args:
        module: Module that is about to load the tensors.
        state_dict: Tensors by name.
        prefix: Prefix of the module's names in `state_dict`.
    """
    own = {name: tensor.shape for name, tensor in module.state_dict().items()}
    own = {name: shape for name, shape in own.items() if not name.startswith("backbone.")}
    given = {
        name.removeprefix(prefix): tensor.shape
        for name, tensor in state_dict.items()
        if name.startswith(prefix) and not name.startswith(f"{prefix}backbone.")
    }
    missing = own.keys() - given.keys()
    unknown = given.keys() - own.keys()
    other = {name for name in own.keys() & given.keys() if own[name] != given[name]}
    faults = [
        f"{len(names)} {what} ({_list(names)})"
        for names, what in (
            (missing, "are not in the checkpoint"),
            (other, "have another shape in it"),
            (unknown, "of the checkpoint are not used"),
        )
        if names
    ]
    if faults:
        log_warning(f"{type(module).__name__} has {len(own)} tensors; {'; '.join(faults)}")


def _list(names: Iterable[str], most: int = 5) -> str:
    names = sorted(names)
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])
