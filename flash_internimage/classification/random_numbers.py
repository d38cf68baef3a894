"""State of the random number generators of Python, NumPy and PyTorch."""

import random
from typing import Any

import numpy as np
import torch


def seed_everything(*numbers: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch from one or more numbers."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """Return the state of all random number generators in types that a checkpoint may contain."""
    of_numpy: Any = np.random.get_state()
    name, keys, *rest = of_numpy
    state = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore all random number generators from a result of :func:`rng_state`.

    Raises:
        ValueError: If NumPy's state would make it read out of bounds.
    """
    _, keys, position, *_ = state["numpy"]
    if len(keys) != 624 or not 0 <= position <= 624:  # NumPy does not check its bounds
        raise ValueError(
            "NumPy's random state must have 624 keys and a position from 0 to 624, got "
            f"{len(keys)} keys and position {position}"
        )
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
