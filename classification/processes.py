"""Agreement between the processes of a run; each function does the least for a single process."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist


class EndedByAnother(Exception):
    """Another process of the run failed; that one reports why."""


def rank() -> int:
    """Return the number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def on_first(level: int) -> int:
    """Return a logging level on the first process, DEBUG elsewhere, for what all of them find."""
    return level if rank() == 0 else logging.DEBUG


def maximum(number: int, device: torch.device) -> int:
    """Return the largest number that any process passes."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def all_agree(yes: bool, device: torch.device) -> bool:
    """Return whether every process passes True."""
    return not maximum(int(not yes), device)


def gather(value: Any) -> list:
    """Return the values of all processes, in the order of their ranks."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def fail_together(device: torch.device) -> Iterator[None]:
    """Run a block on every process; an error on one ends them all.

    Without it, the other processes would wait for the failed one in their next exchange. The block
    itself must not exchange anything.

    Raises:
        Exception: The block's error, on the first process that failed.
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
    """Raise an error that all processes have met: itself on the first, EndedByAnother elsewhere."""
    if rank() == 0:
        raise error
    raise EndedByAnother("process 0 failed") from error
