"""Tests of restoring or dropping the contents of checkpoints other than weights."""

import pickle
import re
import sys
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

from flash_internimage.checkpoints import Placeholder, clean_state_dict, load_checkpoint
from tests.flash_internimage.checkpoints import (
    FORMATS,
    assert_refused,
    forget,
    write,
    write_program,
)


def assert_identical(actual: object, expected: object) -> None:
    """Assert equal types at all levels, and bitwise equal tensors and arrays."""
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


@FORMATS
def test_plain_contents_are_restored(path, archive):
    contents = {
        "numbers": [0, -1, 2**70, 0.1, float("inf"), True, None],
        "text": ["", "Grüße", b"", b"\x00\xff", "x" * 70_000],
        "containers": [
            (),
            (1,),
            (1, 2, 3, 4),
            set(),
            {1, 2},
            frozenset("ab"),
            {},
            {1: [], "a": {}, None: 0, b"x": 1.5},
        ],
        "kinds": [OrderedDict(b=1, a=2), Counter("aab"), torch.Size([2, 3]), torch.device("cpu")],
        "dtypes": [torch.float32, torch.bfloat16, torch.bool],
    }
    write(contents, path, archive)
    assert_identical(load_checkpoint(path), contents)


@FORMATS
def test_tensors_are_restored(path, archive):
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
    }
    write(contents, path, archive)
    loaded = load_checkpoint(path)
    assert_identical(loaded, contents)
    assert loaded["row"].untyped_storage().data_ptr() == loaded["whole"].data_ptr()


# All except quantized dtypes and those that torch cannot save.
DTYPES = {
    dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and not re.match(r"torch\.(q|u?int[1-7]$)", str(dtype))
}


@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=str)
def test_every_dtype_is_restored(path, dtype):
    bits = torch.tensor([0, 1] * 16, dtype=torch.uint8)
    write({"x": bits.view(dtype)}, path)
    loaded = load_checkpoint(path)["x"]
    assert loaded.dtype == dtype
    assert loaded.view(torch.uint8).equal(bits)


@pytest.mark.parametrize("numpy_1", [False, True])
def test_numpy_arrays_and_scalars_are_restored(path, numpy_1):
    counts = np.arange(6).reshape(2, 3)
    contents = {
        "arrays": [counts.astype(kind) for kind in "?bBhHiIqQefd"],
        "order": [counts.T, counts[:, ::2], np.asfortranarray(counts)],
        "bytes": [counts.astype(">i4"), counts.astype("<f8"), counts.astype(">f2")],
        "empty": [np.empty(0), np.empty((0, 3), "i4"), np.array(5)],
        "numbers": [np.float64(0.8361), np.float32(1), np.int64(-3), np.bool_(True)],
    }
    program = pickle.dumps(contents, 2)
    if numpy_1:
        program = program.replace(b"numpy._core", b"numpy.core")
    write_program(program, path)
    loaded = load_checkpoint(path)
    assert_identical(loaded, pickle.loads(program))  # NumPy makes some byte orders native.
    loaded["arrays"][-1][0, 0] = 1


@FORMATS
def test_weights_of_a_published_container_are_restored(path, library, archive, caplog):
    """The authors' training saves its configuration as an object of yacs."""
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
    write({**known, "config": config}, path, archive)
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
    "set": lambda library: library.Tags({1, 2}),
    "slots": lambda library: library.Slots(),
    "member": lambda library: library.Kind.TWO,
    "class": lambda library: library.Slots,
    "function": lambda library: library.make,
}


@FORMATS
@pytest.mark.parametrize("kind", STRANGE)
def test_objects_of_other_libraries_are_replaced(path, library, kind, archive):
    strange = STRANGE[kind](library)
    write({"one": strange, "list": [1, strange], "last": 2}, path, archive)
    forget(library)
    loaded = load_checkpoint(path)
    assert isinstance(loaded["one"], Placeholder)
    assert loaded == {"one": loaded["one"], "list": [1, loaded["one"]], "last": 2}
    assert "foreign_library" not in sys.modules


def test_keys_of_other_libraries_remain_distinct(path, library):
    write({kind: kind.value for kind in library.Kind}, path)
    forget(library)
    assert list(load_checkpoint(path).values()) == [1, 2]


def with_attribute(tensor: torch.Tensor) -> Callable:
    tensor.note = "ours"
    return lambda library: tensor


REFUSED = {
    "list": (lambda library: library.Meter([1, 2, 3]), "items added to a foreign_library.Meter"),
    "keywords": (
        lambda library: library.Keywords(),
        "calls an object that is not a function",
    ),
    "nested": (
        lambda library: library.Slots.Nested(),
        "calls an object that is not a function",
    ),
    "complex number": (lambda library: 1 + 2j, "builtins.complex is not plain data"),
    "bytearray": (lambda library: bytearray(b"a"), "builtins.bytearray is not plain data"),
    "array of text": (lambda library: np.array(["a"]), "numpy.dtype has arguments that torch"),
    "complex array": (lambda library: np.zeros(1, "D"), "numpy.dtype has arguments that torch"),
    "conjugate": (
        lambda library: torch.ones(1).cfloat().conj(),
        "_rebuild_tensor_v2 has arguments",
    ),
    "tensor with attributes": (
        with_attribute(torch.ones(1)),
        "_rebuild_from_type_v2 is not plain data",
    ),
    "parameter with attributes": (
        with_attribute(nn.Parameter(torch.ones(1))),
        "_rebuild_parameter_with_state is not plain data",
    ),
    "module": (lambda library: nn.Linear(2, 2), "a whole model (torch.nn.modules.linear.Linear)"),
    "tuple as a key": (lambda library: {(1, 2): 3}, "must be strings, bytes or numbers"),
    "sparse tensor": (lambda library: torch.eye(2).to_sparse(), "rebuild_sparse_tensor is not pl"),
    "expanded tensor": (
        lambda library: torch.ones(1).expand(3),
        "has arguments that torch.save does not write",
    ),
    "large number": (
        lambda library: 1 << 3000,
        "got the operation LONG4",
    ),
}


@FORMATS
@pytest.mark.parametrize("kind", REFUSED)
def test_error_names_the_unsupported_object(path, library, kind, archive):
    make, message = REFUSED[kind]
    write({"x": make(library)}, path, archive)
    assert_refused(path, re.escape(message))


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_error_names_the_required_protocol(path, protocol):
    torch.save({"x": torch.ones(1), "y": b"1"}, path, pickle_protocol=protocol)
    assert_refused(path, "must be of protocol 2, the default of torch.save")


def test_dtypes_unsupported_by_the_legacy_format_are_rejected(path):
    write({"x": torch.ones(1).to(torch.uint16)}, path, archive=False)
    assert_refused(path, "torch reads this dtype from zip archives only")


def test_the_state_of_a_replaced_object_is_kept(path):
    write({"args": Namespace(lr=0.1, weights=torch.ones(2))}, path)
    args = load_checkpoint(path)["args"]
    assert (args.name, args.state["lr"]) == ("argparse.Namespace", 0.1)
    assert args.state["weights"].equal(torch.ones(2))


def test_safe_globals_of_the_user_are_ignored_and_kept(path):
    write({"args": Namespace(lr=0.1)}, path)
    with torch.serialization.safe_globals([Namespace, (np.dtype, "numpy.dtype")]):
        before = set(torch.serialization.get_safe_globals())
        assert isinstance(load_checkpoint(path)["args"], Placeholder)
        path.write_bytes(path.read_bytes()[:-1])
        assert_refused(path, "")
        assert set(torch.serialization.get_safe_globals()) == before


def test_threads_do_not_disturb_each_other(path):
    for i in range(4):
        write({"args": Namespace(lr=0.1), "x": np.arange(i)}, path.with_name(f"{i}.pth"))
    before = set(torch.serialization.get_safe_globals())
    with ThreadPoolExecutor(4) as pool:
        paths = [path.with_name(f"{i % 4}.pth") for i in range(40)]
        for i, loaded in enumerate(pool.map(load_checkpoint, paths)):
            assert isinstance(loaded["args"], Placeholder)
            assert len(loaded["x"]) == i % 4
    assert set(torch.serialization.get_safe_globals()) == before
