"""Interleaved timing with torch.utils.benchmark, on inputs that are not cached."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch.utils.benchmark import Measurement, Timer

Input = TypeVar("Input")
Call = Callable[[], object]
# Calls alternate for at most TURNS rounds, until each has been measured for the requested time.
# Slow calls are measured in at least MIN_TURNS rounds.
MIN_TURNS, TURNS = 3, 30
UNSTEADY = 0.2  # interquartile range, relative to the median, that indicates a shared machine


class InterleavedTimer(Generic[Input]):
    """Timer of one of several interleaved calls, which cycles through the inputs.

    Args:
        prepare: Returns the call to time for an input; not timed itself.
        inputs: Enough inputs that each call reads from memory, not cache.
        min_time: Total measuring time in seconds.
    """

    def __init__(
        self, prepare: Callable[[Input], Call], inputs: Sequence[Input], min_time: float
    ) -> None:
        self.prepare, self.inputs, self.input_count = prepare, itertools.cycle(inputs), len(inputs)
        self.min_time, self.calls_per_turn = min_time, 1
        self.measurements: list[Measurement] = []
        self.timer = make_timer("next(calls)()", "calls = prepare()", prepare=self.prepare_calls)

    def prepare_calls(self) -> Iterator[Call]:
        """Prepare calls on the next inputs before timing; the timer uses two for warm-up."""
        count = min(self.input_count, max(2, self.calls_per_turn))
        return itertools.cycle([self.prepare(next(self.inputs)) for _ in range(count)])

    def take_turn(self) -> None:
        """Time a single call first, then a fraction of `min_time` per turn until it is reached."""
        seconds = sum(sum(m.raw_times) for m in self.measurements)
        if len(self.measurements) < MIN_TURNS or seconds < self.min_time:
            measurement = self.timer.timeit(self.calls_per_turn)
            self.measurements.append(measurement)
            self.calls_per_turn = math.ceil(self.min_time / TURNS / measurement.median)


def make_timer(statement: str, setup: str = "pass", **names: Any) -> Timer:
    """Return a timer with the number of threads of this process."""
    return Timer(statement, setup, globals=names, num_threads=torch.get_num_threads())


def measure_interleaved(
    prepares: Mapping[str, Callable[[Input], Call]], inputs: Sequence[Input], min_time: float
) -> dict[str, dict]:
    """Time calls alternately, so that changes in the machine's speed affect all of them.

    Args:
        prepares: Functions by name; each returns the call to time for an input.
        inputs: Inputs of the calls.
        min_time: Measuring time per call, in seconds.

    Returns:
        Summaries of the measurements by name, or the reason why there are none.
    """
    timers = {n: InterleavedTimer(prepare, inputs, min_time) for n, prepare in prepares.items()}
    failures: dict[str, dict] = {}
    for _ in range(TURNS):
        for name, timer in timers.items():
            try:
                if name not in failures:
                    timer.take_turn()
            except RuntimeError as error:
                failures[name] = {"status": "failed", "note": reason(error)}
    return {n: failures.get(n) or summarize(t.measurements) for n, t in timers.items()}


def measure(call: Call, min_time: float) -> dict:
    """Time a call until the measurements are steady, for at most five times `min_time` seconds."""
    autorange = make_timer("call()", call=call).adaptive_autorange
    return summarize([autorange(UNSTEADY, min_run_time=min_time, max_run_time=5 * min_time)])


def summarize(measurements: list[Measurement]) -> dict:
    """Return the median, the quartiles (both in seconds per call) and the number of calls."""
    (merged,) = Measurement.merge(measurements)
    quartiles = torch.tensor([0.25, 0.75], dtype=torch.float64)
    low, high = torch.tensor(merged.times, dtype=torch.float64).quantile(quartiles).tolist()
    calls = sum(m.number_per_run * len(m.raw_times) for m in measurements)
    return {"seconds": merged.median, "low": low, "high": high, "calls": calls}


def is_unsteady(result: dict) -> bool:
    """Return whether the quartiles are so far apart that the machine was probably shared."""
    return result["high"] - result["low"] > UNSTEADY * result["seconds"]


def reason(error: Exception) -> str:
    """Return why a measurement failed, for tables; without the paths that messages may contain."""
    for known in ("out of memory", "can't allocate memory", "not implemented"):
        if known in str(error):
            return known
    return type(error).__name__


@functools.cache
def cache_bytes(device: torch.device) -> int:
    """Return the size of the last-level cache, or 32 MiB if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [
        int(file.read_text().strip().removesuffix("K")) * 1024
        for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(sizes, default=32 * 2**20)


def copy_bandwidth(device: torch.device, min_time: float) -> float:
    """Return the bytes read and written per second by a copy larger than the caches."""
    size = max(8 * cache_bytes(device), 256 * 2**20)
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / measure(lambda: target.copy_(source), min_time)["seconds"]
