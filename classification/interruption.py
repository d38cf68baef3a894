"""Stopping at a signal: the running update is finished and the state saved."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Protocol


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the state has been saved."""

    def __init__(self, signal_number: int):
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class Stoppable(Protocol):
    """What stops after its running update once `signal_number` is set."""

    signal_number: int


@contextlib.contextmanager
def stopped_by_signals(trainer: Stoppable) -> Iterator[None]:
    """Make SIGINT and SIGTERM in the block set the trainer's `signal_number`."""

    def on_signal(number: int, frame) -> None:
        trainer.signal_number = number

    before = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
