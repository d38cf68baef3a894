"""Coordinate the processes of a run; a single process never communicates."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so


class EndedByAnother(Exception):
    """Raised if another process failed; that process reports the reason."""


def join_processes(device: torch.device) -> torch.device:
    """Join the processes of torchrun or SLURM, if any, and return the device of this one.

    Args:
        device: Device of a single process; several processes use the one of their local rank.
    """
    if dist.is_initialized():
        return device
    return torch.device(init_distributed_device_so(device=str(device))["device"])


def rank() -> int:
    """Return the rank of this process, 0 without torch.distributed."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes, 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_initialized() else 1


def on_first(level: int) -> int:
    """Return `level` on the first process and DEBUG elsewhere, to log shared messages once."""
    return level if rank() == 0 else logging.DEBUG


def maximum(number: int, device: torch.device) -> int:
    """Return the maximum of the numbers that the processes pass."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def all_agree(yes: bool, device: torch.device) -> bool:
    """Return whether every process passes True."""
    return not maximum(int(not yes), device)


def gather(value: Any) -> list:
    """Return the values of all processes, ordered by rank."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def fail_together(device: torch.device) -> Iterator[None]:
    """Run a block on every process, and fail on all of them if it fails on one.

    Without this, the other processes would wait for the failed one in their next collective
    operation. The block itself must not contain any.

    Raises:
        Exception: Error of the block, on the first process that failed.
        EndedByAnother: On all other processes.
    """
    if world_size() == 1:
        yield
        return
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    first = world_size() - maximum(0 if failure is None else world_size() - rank(), device)
    if first == rank() and failure is not None:
        raise failure
    if first < world_size():
        raise EndedByAnother(f"process {first} failed") from failure


def raise_once(error: Exception) -> None:
    """Raise an error that occurred on all processes; all but the first raise EndedByAnother."""
    if rank() == 0:
        raise error
    raise EndedByAnother("process 0 failed") from error
