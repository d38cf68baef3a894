"""TensorBoard event files."""

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import image, scalar

from ..files import disk_full_error


class Events:
    """TensorBoard event file of scalars and images.

    SummaryWriter writes in a thread, whose errors on a full disk end in tracebacks.

    Args:
        folder: Folder in which a new file is created.
        purge_step: TensorBoard hides what earlier files contain from this step on.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self.path = folder / name
        self.file = open(self.path, "xb")  # noqa: SIM115  (closed by close)
        self.writer = RecordWriter(self.file)
        start = SessionLog(status=SessionLog.START)
        self._write(Event(file_version="brain.Event:2"), Event(step=purge_step, session_log=start))

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        """Write the scalars of a step.

        Raises:
            OSError: If the file cannot be written.
        """
        self._write(
            *(Event(step=step, summary=scalar(name, value)) for name, value in scalars.items())
        )

    def add_image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Write an image, an (H, W, 3) uint8 array in RGB, of a step.

        Raises:
            OSError: If the file cannot be written.
        """
        self._write(Event(step=step, summary=image(name, pixels, dataformats="HWC")))

    def _write(self, *events: Event) -> None:
        try:
            for event in events:
                event.wall_time = time.time()
                self.writer.write(event.SerializeToString())
            self.writer.flush()
        except OSError as error:
            raise disk_full_error(error, self.path) or error from error

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # already raised when writing
            self.file.close()
