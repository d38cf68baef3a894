"""Fixtures of the tests that read checkpoints."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

LIBRARY = """
from enum import Enum

class CfgNode(dict):  # of yacs
    def __init__(self, entries):
        super().__init__(entries)
        self.__dict__["_immutable"] = True

class Meter(list):
    pass

class Tags(set):
    pass

class Slots:
    __slots__ = ("a", "b")
    class Nested:
        pass
    def __init__(self):
        self.a, self.b = 1, [2]

class Kind(Enum):
    ONE = 1
    TWO = 2

class Keywords:
    def __getnewargs_ex__(self):
        return (1,), {"b": 2}
    def __new__(cls, a=None, b=None):
        return super().__new__(cls)

class Reduced:
    def __reduce__(self):
        return make, (1, "a"), {"state": 1}, iter([1, 2]), iter({"x": 1}.items())
    append = __setitem__ = lambda self, *args: None

def make(*args):
    return Reduced()
"""


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "model.pth"


@pytest.fixture
def library(tmp_path, monkeypatch) -> Iterator[ModuleType]:
    """Install a library for writing a checkpoint; `forget` removes it."""
    (tmp_path / "foreign_library.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(tmp_path)
    library = importlib.import_module("foreign_library")
    yield library
    sys.modules.pop("foreign_library", None)


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> dict[str, Path]:
    """Write a checkpoint of each model in tests.nano, and return their paths by model."""
    from tests import nano

    folder = tmp_path_factory.mktemp("weights")
    openmmlab = (nano.DETECTOR, nano.SEGMENTOR)
    return {
        nano.CLASSIFIER: nano.write_classifier(folder / "classifier.pth"),
        **{name: nano.write_openmmlab_model(name, folder / f"{name}.pth") for name in openmmlab},
    }
