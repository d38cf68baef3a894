"""The models of the page, loaded once and dropped when others are used."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event
from time import sleep

import pytest

from flash_internimage.app.models import Models, Source, unique_labels

A, B, C = Source("a"), Source("b"), Source("c")
WEIGHTS = Path("weights.pth")


def fetch(source: Source) -> Path:
    return WEIGHTS


class Loader:
    """Return an object for each load, and list the loaded models."""

    def __init__(self) -> None:
        self.loads: list[str] = []

    def __call__(self, source: Source, weights: Path) -> object:
        assert weights == WEIGHTS
        self.loads.append(source.model)
        return object()


def test_a_model_that_several_users_want_is_loaded_once_and_used_by_one_at_a_time():
    load, start, users = Loader(), Barrier(8), []
    models = Models([A, B], fetch, load)

    def use(_: int) -> object:
        start.wait()
        with models.use("a") as model:
            users.append(model)
            sleep(0.01)
            assert users.pop() is model
            assert not users
        return model

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(use, range(8)))) == 1
    assert load.loads == ["a"]


def test_the_model_unused_for_the_longest_time_is_dropped():
    load = Loader()
    models = Models([A, B, C], fetch, load, kept=2)
    for label in "abacab":
        with models.use(label):
            pass
    assert load.loads == ["a", "b", "c", "b"]


def test_a_loaded_model_can_be_used_while_another_is_downloaded():
    used = Event()

    def fetch_slowly(source: Source) -> Path:
        assert source is A or used.wait(timeout=10)
        return WEIGHTS

    models = Models([A, B], fetch_slowly, Loader())

    def use_b() -> None:
        with models.use("b"):
            pass

    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(use_b)
        with models.use("a"):
            used.set()
        other.result()


def test_a_download_that_failed_is_repeated():
    outcomes = iter([OSError("no connection"), WEIGHTS])

    def fetch_at_second_try(_: Source) -> Path:
        outcome = next(outcomes)
        if isinstance(outcome, OSError):
            raise outcome
        return outcome

    models = Models([A], fetch_at_second_try, Loader())
    with pytest.raises(OSError, match="no connection"), models.use("a"):
        pass
    with models.use("a"):
        pass
    assert next(outcomes, None) is None


@pytest.mark.parametrize(
    ("source", "label"),
    [
        (Source("flash_internimage_tiny.in1k"), "flash_internimage_tiny.in1k"),
        (Source("/home/me/my_config.py", "/home/me/best.pth"), "my_config (best.pth)"),
        (Source("digits.yaml", "https://host/w.pth"), "digits (w.pth)"),
    ],
)
def test_labels_contain_no_folders(source, label):
    assert source.label() == label


@pytest.mark.parametrize(
    ("checkpoints", "labels"),
    [
        (["run1/best.pth", "run2/best.pth"], ["a (run1/best.pth)", "a (run2/best.pth)"]),
        (["best.pth", "run2/best.pth"], ["a (best.pth)", "a (run2/best.pth)"]),
        (["x/1/w.pth", "y/1/w.pth", "v.pth"], ["a (x/1/w.pth)", "a (y/1/w.pth)", "a (v.pth)"]),
        (["./w.pth", "w.pth"], ["a (w.pth)", "a (w.pth) 2"]),
    ],
)
def test_folders_tell_checkpoints_of_one_name_apart(checkpoints, labels):
    assert unique_labels([Source("a.py", checkpoint) for checkpoint in checkpoints]) == labels


def test_sources_must_differ():
    with pytest.raises(ValueError, match="got 'a' twice"):
        Models([A, B, A], fetch, Loader())
