"""Parameter names in state dicts: strip the prefixes of wrappers, and rename entries."""

import re
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

# Prefixes that wrappers add to all names of a model, and what torch inserts anywhere in them.
_WRAPPERS = ("module.", "model.", "net.", "timm_model.", "body.", "graph_module.")
_INSERTED = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Counters that the averaged models of torch and mmengine store next to the weights.
_COUNTERS = ("n_averaged", "steps")


def unwrap_names(names: Mapping[str, str]) -> dict[str, str]:
    """Map the names in a state dict to parameter names of the model without its wrappers.

    `module.`, `model.` and other prefixes of parallel training, averaging, Lightning, transformers
    and timm are stripped, in any order, if all names have them. `_orig_mod.` of torch.compile and
    similar insertions are removed everywhere. If a prefix is stripped, the counters of averaged
    models are left out. The `ema_*` buffers of mmcv are always left out: if a file has them, the
    plain names contain the averaged weights and the buffers the trained ones.

    Args:
        names: Current name of each entry by its name in the file.

    Returns:
        Name in the model of each remaining entry by its name in the file.
    """
    names = {old: _INSERTED.sub("", name) for old, name in names.items()}
    while True:
        names = {old: name for old, name in names.items() if not re.match(r"ema_[^.]*$", name)}
        rest = {old: name for old, name in names.items() if name not in _COUNTERS}
        shared = [p for p in _WRAPPERS if all(name.startswith(p) for name in rest.values())]
        if not (rest and shared):
            return names
        names = {old: name.removeprefix(shared[0]) for old, name in rest.items()}


def rename(state_dict: Mapping[str, T], names: Mapping[str, str]) -> dict[str, T]:
    """Select and rename entries of a state dict.

    Args:
        state_dict: Entries with values of any type.
        names: New name of each entry to keep by its current name.

    Returns:
        The selected entries under their new names.

    Raises:
        ValueError: If two entries get the same name.
    """
    sources: dict[str, str] = {}
    for name, new in names.items():
        if new in sources:
            raise ValueError(f"state_dict has two entries for {new}: {sources[new]} and {name}")
        sources[new] = name
    return {new: state_dict[name] for new, name in sources.items()}
