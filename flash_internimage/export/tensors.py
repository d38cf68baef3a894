"""Runtimes of PyTorch, called with arrays."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from .formats import Runtime


def call_with_arrays(model: Callable, names: Sequence[str], threads: int | None) -> Runtime:
    """Return a function that calls a model with an array and returns arrays by name.

    Args:
        model: Function from a tensor to a tuple of tensors.
        names: Names of the outputs.
        threads: Number of threads; None for that of the process.
    """

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        with use_threads(threads), torch.inference_mode():
            # AOTInductor reads images in the memory format of the traced example.
            outputs = model(torch.from_numpy(np.ascontiguousarray(images)))
        return {name: output.numpy() for name, output in zip(names, outputs, strict=True)}

    return run


@contextmanager
def use_threads(threads: int | None) -> Iterator[None]:
    """Set the number of threads of PyTorch within a block; None leaves it unchanged."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
