"""Stop a run on a signal, after it has finished the current optimizer step and saved its state."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Protocol


class Interrupted(Exception):
    """Raised after SIGINT or SIGTERM, once the state has been saved.

    Args:
        signal_number: Number of the signal.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class Stoppable(Protocol):
    """Object that stops after its current optimizer step once `signal_number` is set."""

    signal_number: int


@contextlib.contextmanager
def stopped_by_signals(trainer: Stoppable) -> Iterator[None]:
    """Let SIGINT and SIGTERM set the trainer's `signal_number` within the block."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        trainer.signal_number = number

    before = {n: signal.signal(n, on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
