"""What checkpoints hold beside weights is restored or left out."""

import pickle
import re
import sys
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from flash_internimage.checkpoint import clean_state_dict, load_checkpoint
from flash_internimage.unpickling import Placeholder
from tests.flash_internimage.checkpoints import (
    FORMATS,
    PROTOCOLS,
    Counts,
    forget,
    write,
    write_program,
)


def assert_identical(actual: object, expected: object) -> None:
    """Of the same type throughout, and tensors and arrays of the same bits."""
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key in expected:
            assert_identical(actual[key], expected[key])
    elif isinstance(expected, list | tuple) and not isinstance(expected, torch.Size):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_identical(one, other)
    elif isinstance(expected, torch.Tensor):
        assert (actual.dtype, actual.shape, actual.stride(), actual.requires_grad) == (
            expected.dtype, expected.shape, expected.stride(), expected.requires_grad
        )  # fmt: skip
        assert actual.equal(expected)
    elif isinstance(expected, np.ndarray):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        assert np.array_equal(actual, expected)
    else:
        assert actual == expected


@PROTOCOLS
@FORMATS
def test_plain_contents_are_restored(path, archive, protocol):
    contents = {
        "numbers": [0, -1, 2**70, 0.1, float("inf"), 1 + 2j, True, None],
        "text": ["", "Grüße", b"", b"\x00\xff", bytearray(b"\x80"), "x" * 70_000],
        "containers": [(), (1,), (1, 2, 3, 4), set(), {1, 2}, frozenset("ab"), {}, {(1, "a"): []}],
        "kinds": [OrderedDict(b=1, a=2), Counter("aab"), torch.Size([2, 3]), torch.device("cpu")],
        "dtypes": [torch.float32, torch.bfloat16, torch.bool],
    }
    write(contents, path, archive, protocol)
    assert_identical(load_checkpoint(path), contents)


@PROTOCOLS
@FORMATS
def test_tensors_are_restored(path, archive, protocol):
    x = torch.arange(12.0).view(3, 4)
    contents = {
        "whole": x,
        "transposed": x.T,
        "row": x[1],
        "empty": torch.empty(0, 3),
        "number": torch.tensor(7),
        "with gradient": torch.ones(2, requires_grad=True),
        "parameter": nn.Parameter(torch.ones(2)),
        "frozen parameter": nn.Parameter(torch.ones(2), requires_grad=False),
        "conjugate": torch.tensor([1 + 2j]).conj(),
    }
    write(contents, path, archive, protocol)
    loaded = load_checkpoint(path)
    assert_identical(loaded, contents)
    assert loaded["row"].untyped_storage().data_ptr() == loaded["whole"].data_ptr()


# but for quantized ones, and for those that torch does not save
DTYPES = {
    dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not re.match(r"torch\.(q|u?int[1-7]$)", str(dtype))
}


@FORMATS
@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=str)
def test_every_dtype_is_restored(path, archive, dtype):
    bits = torch.tensor([0, 1] * 16, dtype=torch.uint8)
    write({"x": bits.view(dtype)}, path, archive)
    loaded = load_checkpoint(path)["x"]
    assert loaded.dtype == dtype
    assert loaded.view(torch.uint8).equal(bits)


@FORMATS
def test_versions_of_a_state_dict_are_restored(path, archive):
    state_dict = nn.BatchNorm1d(2).state_dict()
    write({"model": state_dict}, path, archive)
    loaded = load_checkpoint(path)["model"]
    assert_identical(loaded, state_dict)
    assert loaded._metadata == state_dict._metadata


def test_tensors_come_without_the_attributes_they_were_given(path):
    contents = {"tensor": torch.ones(2), "parameter": nn.Parameter(torch.ones(2))}
    for tensor in contents.values():
        tensor.note = "ours"
    write(contents, path)
    loaded = load_checkpoint(path)
    assert_identical(loaded, contents)
    assert not any(hasattr(tensor, "note") for tensor in loaded.values())


@PROTOCOLS
@pytest.mark.parametrize("numpy_1", [False, True])
def test_numpys_arrays_and_numbers_are_restored(path, protocol, numpy_1):
    counts = np.arange(6).reshape(2, 3)
    contents = {
        "arrays": [counts.astype(kind) for kind in "?bBhHiIqQefdFD"],
        "order": [counts.T, counts[:, ::2], np.asfortranarray(counts)],
        "bytes": [counts.astype(">i4"), counts.astype("<f8"), counts.astype(">f2")],
        "text": [np.array(["a", "Grüße"]), np.array([b"a", b"bc"])],
        "empty": [np.empty(0), np.empty((0, 3), "i4"), np.array(5)],
        "numbers": [np.float64(0.8361), np.float32(1), np.int64(-3), np.bool_(True), np.str_("x")],
    }
    program = pickle.dumps(contents, protocol)
    if numpy_1 and protocol < 4:  # the lengths of names do not matter
        program = program.replace(b"numpy._core", b"numpy.core")
    write_program(program, path)
    loaded = load_checkpoint(path)
    assert_identical(loaded, pickle.loads(program))  # as numpy does, which makes some native
    loaded["arrays"][-1][0, 0] = 1


@PROTOCOLS
@FORMATS
def test_a_published_container_gives_its_weights(path, library, archive, protocol, caplog):
    """As the authors' training writes it: the configuration is an object of yacs."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 6])
    known = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "max_accuracy": np.float64(83.6),
        "epoch": 299,
    }
    config = library.CfgNode({"MODEL": library.CfgNode({"NAME": "flash", "DEPTHS": [4, 4, 18]})})
    write({**known, "config": config}, path, archive, protocol)
    forget(library)
    with caplog.at_level("INFO"):
        loaded = load_checkpoint(path)
    assert_identical(clean_state_dict(loaded), dict(model.state_dict()))
    assert repr(loaded.pop("config")) == "<foreign_library.CfgNode, not restored>"
    assert_identical(loaded, known)
    assert "foreign_library" not in sys.modules
    assert f"not restored from {path}: foreign_library.CfgNode\n" in caplog.text


STRANGE = {
    "dict": lambda library: library.CfgNode({"a": 1, "b": library.CfgNode({})}),
    "list": lambda library: library.Meter([1, 2, 3]),
    "list of one": lambda library: library.Meter([1]),
    "set": lambda library: library.Tags({1, 2}),
    "slots": lambda library: library.Slots(),
    "member": lambda library: library.Kind.TWO,
    "keywords": lambda library: library.Keywords(),
    "reduced": lambda library: library.Reduced(),
    "nested": lambda library: library.Slots.Nested(),
    "class": lambda library: library.Slots,
    "function": lambda library: library.make,
}


@PROTOCOLS
@FORMATS
@pytest.mark.parametrize("kind", STRANGE)
def test_objects_of_other_libraries_are_left_out(path, library, kind, archive, protocol):
    strange = STRANGE[kind](library)
    write({"one": strange, "list": [1, strange], "last": 2}, path, archive, protocol)
    forget(library)
    loaded = load_checkpoint(path)
    assert isinstance(loaded["one"], Placeholder)
    assert loaded == {"one": loaded["one"], "list": [1, loaded["one"]], "last": 2}
    assert "foreign_library" not in sys.modules


def test_keys_of_other_libraries_stay_apart(path, library):
    write({kind: kind.value for kind in library.Kind}, path)
    forget(library)
    assert list(load_checkpoint(path).values()) == [1, 2]


@PROTOCOLS
def test_what_the_caller_names_is_restored(path, library, protocol):
    write({"counts": Counts(), "other": library.Slots()}, path, True, protocol)
    forget(library)
    name = f"{Counts.__module__}.{Counts.__qualname__}"
    loaded = load_checkpoint(path, types={name: Counts})
    assert type(loaded["counts"]) is Counts
    assert loaded["counts"].counts == [1, 2]
    assert isinstance(loaded["other"], Placeholder)
