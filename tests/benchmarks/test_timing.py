import functools

import pytest
import torch
from torch.utils.benchmark import Measurement
from torch.utils.benchmark.utils.common import TaskSpec

from benchmarks import timing


def log_call(log, name, preparing):
    if preparing:
        log.append(f"prepare {name}")
    return lambda: log.append(name)


def test_calls_alternate():
    log = []
    prepares = {name: lambda _, name=name: log_call(log, name, False) for name in ("a", "b")}
    results = timing.measure_interleaved(prepares, [0], min_time=1e-9)
    turn = 3  # including two warm-up calls of the timer
    assert log == (["a"] * turn + ["b"] * turn) * timing.MIN_TURNS
    assert [r["calls"] for r in results.values()] == [timing.MIN_TURNS] * 2


def test_inputs_alternate_and_are_prepared_before_timing():
    log = []
    timing.measure_interleaved({"": lambda name: log_call(log, name, True)}, "abcd", min_time=1e-9)
    warm_up = ["prepare a", "prepare b", "a", "b"]
    assert log[: len(warm_up)] == warm_up
    assert log[len(warm_up) :][:3] == ["prepare c", "prepare d", "c"]


@pytest.mark.parametrize(("seconds", "calls"), [(2**-10, 309), (2**-5, 10), (1, 3)])
def test_calls_are_timed_for_the_requested_time(seconds, calls, monkeypatch):
    now = [0.0]

    def call():
        now[0] += seconds

    clock = functools.partial(timing.Timer, timer=lambda: now[0])
    monkeypatch.setattr(timing, "Timer", clock)
    result = timing.measure_interleaved({"": lambda _: call}, [0], min_time=0.3)[""]
    assert result["calls"] == calls
    assert [result[key] for key in ("low", "seconds", "high")] == pytest.approx([seconds] * 3)


@pytest.mark.parametrize("calls_before", [0, 4])
def test_failing_call_does_not_affect_the_others(calls_before):
    calls = iter(range(calls_before))

    def fail():
        if next(calls, None) is None:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB at /home/someone")

    prepares = {"fails": lambda _: fail, "works": lambda _: int}
    results = timing.measure_interleaved(prepares, [0], min_time=1e-9)
    assert results["fails"] == {"status": "failed", "note": "out of memory"}
    assert results["works"]["calls"] >= timing.MIN_TURNS


def test_a_single_call_is_timed_until_the_measurements_are_steady():
    result = timing.measure(lambda: sum(range(1000)), min_time=0.01)
    assert result["calls"] > 4
    assert 0 < result["low"] <= result["seconds"] <= result["high"]


def test_summary_has_median_and_quartiles_per_call():
    blocks = [Measurement(2, [2.0 * seconds], TaskSpec("", "")) for seconds in (1, 2, 3, 4, 9)]
    result = timing.summarize(blocks)
    assert result == {"seconds": 3, "low": 2, "high": 4, "calls": 10}
    assert timing.is_unsteady(result)
    assert not timing.is_unsteady(result | {"low": 2.8, "high": 3.2})


def test_timing_uses_the_threads_of_the_process():
    threads = []
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        timing.measure(lambda: threads.append(torch.get_num_threads()), min_time=1e-6)
    finally:
        torch.set_num_threads(before)
    assert set(threads) == {2}
