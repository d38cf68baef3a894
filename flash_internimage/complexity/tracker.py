"""Count the work and the memory of the operators of PyTorch that run."""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

import ops_dcnv4  # noqa: F401  registers its operators with flop_counter


class Tracker(TorchDispatchMode):
    """Track the operators that run inside the context, on any device.

    Memory is that of all storages that are reachable: workspaces of kernels and what an allocator
    reserves beyond that are unknown.

    Args:
        tensors: Tensors that exist already, such as the parameters of a model.

    Attributes:
        multiply_adds: Half the FLOPs that `torch.utils.flop_counter` counts.
        activations: Elements in the outputs of convolutions, matrix products and the operators of
            ops_dcnv4, as fvcore counts them.
        memory: Bytes of the storages that are alive.
        peak_memory: Maximum of `memory`.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.multiply_adds = self.activations = self.memory = self.peak_memory = 0
        self._alive: set[int] = set()
        for tensor in tensors:
            self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address not in self._alive:
            self._alive.add(address)
            weakref.finalize(storage, self._remove, address, size)
            self.memory += size
            self.peak_memory = max(self.peak_memory, self.memory)

    def _remove(self, address: int, size: int) -> None:
        self._alive.remove(address)
        self.memory -= size

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Any,
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operator and count it."""
        outputs = func(*args, **(kwargs or {}))
        tensors = [output for output in tree_iter(outputs) if isinstance(output, Tensor)]
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.multiply_adds += count(*args, **(kwargs or {}), out_val=outputs) // 2
            self.activations += tensors[0].numel()
        for tensor in tensors:
            self._add(tensor)
        return outputs
