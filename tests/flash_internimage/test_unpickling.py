"""What checkpoints hold beside weights, and that nothing in them is executed or imported."""

import codecs
import copy
import copyreg
import importlib
import os
import pickle
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from flash_internimage.checkpoint import clean_state_dict, load_checkpoint
from flash_internimage.unpickling import Placeholder

FORMATS = pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
PROTOCOLS = pytest.mark.parametrize("protocol", [2, 3, 4, 5])


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "model.pth"


def write(contents: object, path: Path, archive: bool = True, protocol: int = 2) -> None:
    torch.save(contents, path, pickle_protocol=protocol, _use_new_zipfile_serialization=archive)


def write_program(program: bytes, path: Path, archive: bool = True) -> None:
    """A file of torch.save with another pickle for its contents."""
    if archive:
        writer = torch._C.PyTorchFileWriter(str(path))
        writer.write_record("data.pkl", program, len(program))
        writer.write_end_of_file()
    else:
        header = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {})
        parts = [*(pickle.dumps(part, 2) for part in header), program, pickle.dumps([], 2)]
        path.write_bytes(b"".join(parts))


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


# What is restored


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
def library(tmp_path, monkeypatch) -> Iterator[ModuleType]:
    """A library that is there while a checkpoint is written; `forget` removes it."""
    (tmp_path / "foreign_library.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(tmp_path)
    library = importlib.import_module("foreign_library")
    yield library
    sys.modules.pop("foreign_library", None)


def forget(library: ModuleType) -> None:
    Path(library.__file__).unlink()
    del sys.modules["foreign_library"]
    importlib.invalidate_caches()


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


class Counts:
    def __init__(self):
        self.counts = [1, 2]

    def __setstate__(self, state):
        pytest.fail("the file's state is given to a method")


@PROTOCOLS
def test_what_the_caller_names_is_restored(path, library, protocol):
    write({"counts": Counts(), "other": library.Slots()}, path, True, protocol)
    forget(library)
    name = f"{Counts.__module__}.{Counts.__qualname__}"
    loaded = load_checkpoint(path, types={name: Counts})
    assert type(loaded["counts"]) is Counts
    assert loaded["counts"].counts == [1, 2]
    assert isinstance(loaded["other"], Placeholder)


# What is not done


def literal(value: object) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def dotted(module: str, name: str) -> bytes:
    """As in protocol 4, where a name may lead to the attribute of an attribute."""
    return literal(module) + literal(name) + pickle.STACK_GLOBAL


def call(function: bytes, *args: bytes) -> bytes:
    return function + pickle.MARK + b"".join(args) + pickle.TUPLE + pickle.REDUCE


def program(item: bytes) -> bytes:
    """The pickle of {"item": item}."""
    return b"\x80\x04}" + literal("item") + item + pickle.SETITEM + pickle.STOP


SYSTEM = call(named("builtins", "__import__"), literal("os"))
MKDIR = named("posix", "mkdir")
# Each makes a file or a folder of the name that it is given.
HOSTILE: dict[str, Callable[[str], bytes]] = {
    "system": lambda f: call(named("os", "system"), literal(f"touch {f}")),
    "mkdir": lambda f: call(MKDIR, literal(f)),
    "process": lambda f: call(named("subprocess", "check_call"), literal(["touch", f])),
    "eval": lambda f: call(named("builtins", "eval"), literal(f"open({f!r}, 'w').close()")),
    "exec": lambda f: call(named("builtins", "exec"), literal(f"open({f!r}, 'w').close()")),
    "open": lambda f: call(named("io", "open"), literal(f), literal("w")),
    "getattr": lambda f: call(
        call(named("builtins", "getattr"), SYSTEM, literal("mkdir")), literal(f)
    ),
    "partial": lambda f: call(call(named("functools", "partial"), MKDIR, literal(f))),
    "attrgetter": lambda f: call(
        call(call(named("operator", "attrgetter"), literal("mkdir")), SYSTEM), literal(f)
    ),
    "methodcaller": lambda f: call(
        call(named("operator", "methodcaller"), literal("mkdir")),
        call(named("pathlib", "PosixPath"), literal(f)),
    ),
    "of torch": lambda f: call(named("torch", "save"), literal({}), literal(f)),
    "of torch.hub": lambda f: call(dotted("torch.hub", "os.mkdir"), literal(f)),
    "of numpy": lambda f: call(named("numpy", "save"), literal(f), literal(1)),
    "method": lambda f: call(
        dotted("pathlib", "Path.mkdir"), call(named("pathlib", "PosixPath"), literal(f))
    ),
    "in a set": lambda f: call(
        named("builtins", "set"), call(named("builtins", "map"), MKDIR, literal([f]))
    ),
    "instance": lambda f: pickle.MARK + literal(f) + pickle.INST + b"posix\nmkdir\n",
    "object": lambda f: pickle.MARK + MKDIR + literal(f) + pickle.OBJ,
}


@FORMATS
@pytest.mark.parametrize("kind", HOSTILE)
def test_nothing_is_executed(path, tmp_path, kind, archive):
    marker = tmp_path / "marker.npy"
    hostile = program(HOSTILE[kind](str(marker)))
    pickle.loads(hostile)  # which would do it
    assert marker.exists()
    marker.rename(tmp_path / "done")
    write_program(hostile, path, archive)
    with suppress(ValueError):  # iterating over a placeholder
        assert isinstance(load_checkpoint(path)["item"], Placeholder)
    assert not marker.exists()


@FORMATS
def test_a_rebuild_of_tensors_calls_nothing_else(path, tmp_path, archive):
    rebuild = named("torch._tensor", "_rebuild_from_type_v2")
    args = MKDIR, named("torch", "Tensor"), literal((str(tmp_path / "made"),)), literal({})
    write_program(program(call(rebuild, *args)), path, archive)
    assert isinstance(load_checkpoint(path)["item"], Placeholder)
    assert not (tmp_path / "made").exists()


@FORMATS
@pytest.mark.parametrize(
    "item",
    [
        named("foreign_library", "CfgNode"),
        dotted("foreign_library", "Slots.Nested"),
        call(named("builtins", "__import__"), literal("foreign_library")),
        pickle.MARK + pickle.INST + b"foreign_library\nSlots\n",
    ],
)
def test_nothing_is_imported(path, library, item, archive):
    del sys.modules["foreign_library"]
    pickle.loads(program(item))
    assert sys.modules.pop("foreign_library")
    write_program(program(item), path, archive)
    assert isinstance(load_checkpoint(path)["item"], Placeholder)
    assert "foreign_library" not in sys.modules


def test_a_codec_is_not_imported(path):
    encoded = call(named("_codecs", "encode"), literal("text"), literal("rot13"))
    write_program(program(encoded), path)
    sys.modules.pop("encodings.rot_13", None)
    assert load_checkpoint(path)["item"] == b"text"
    assert "encodings.rot_13" not in sys.modules


def assert_refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged or no .*{message}"):
        load_checkpoint(path)


@pytest.mark.parametrize("opcode", [b"\x82\x7b", b"\x83\x7b\x00", b"\x84\x7b\x00\x00\x00"])
def test_registered_extensions_are_not_reached(path, opcode):
    copyreg.add_extension("os", "mkdir", 0x7B)
    try:
        assert pickle.loads(program(opcode)) == {"item": os.mkdir}  # and keeps it in its cache
        write_program(program(opcode), path)
        assert_refused(path, "extension 123")
    finally:
        copyreg.remove_extension("os", "mkdir", 0x7B)


REBUILD = named("torch._utils", "_rebuild_tensor_v2")


@FORMATS
@pytest.mark.parametrize(
    ("target", "types"),
    [
        (REBUILD, {}),
        (named("torch", "Size"), {}),
        (named("torch", "FloatStorage"), {}),
        (named("here", "Counts"), {"here.Counts": Counts}),
    ],
)
def test_attributes_of_the_process_stay(path, target, types, archive):
    state = literal((None, {"changed": True}))
    write_program(program(target + state + pickle.BUILD), path, archive)
    with pytest.raises(ValueError, match="state for a"):
        load_checkpoint(path, types=types)
    assert not hasattr(torch._utils._rebuild_tensor_v2, "changed")
    assert not hasattr(Counts, "changed")


@pytest.mark.parametrize(
    "write_to", [literal(0) + literal(1) + pickle.SETITEM, literal(1) + pickle.APPEND]
)
def test_nothing_but_containers_takes_items(path, write_to):
    array = literal(np.zeros(2))
    write_program(program(array + write_to), path)
    assert_refused(path, "items for a ndarray")


@FORMATS
def test_no_source_is_compared(path, tmp_path, monkeypatch, archive):
    """Where a class has dump_patches, torch's legacy reader writes its changes to a file."""
    monkeypatch.chdir(tmp_path)
    cell = named("torch.nn", "Linear")
    key = pickle.MARK + literal("module") + cell + literal("a") + literal("b") + pickle.TUPLE
    write_program(program(key + pickle.BINPERSID), path, archive)
    assert_refused(path, "persistent id")
    assert os.listdir(tmp_path) == ["model.pth"]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (literal(np.array([None])), "dtype O8"),
        (literal(np.zeros(1, "i4,O")), "dtype V12"),
        (call(named("numpy", "dtype"), literal("i4,O")), "dtype i4,O"),
        (
            call(named("numpy._core.multiarray", "scalar"), literal("O"), literal(b"8" * 8)),
            "of str",
        ),
        (literal(np.zeros(3)).replace(b"K\x03\x85", b"K\x04\x85"), "reshape"),
        (literal(np.float64(0.5)).replace(b"\x02\0\0\0f8", b"\x03\0\0\0c16"), "buffer"),
    ],
)
def test_arrays_that_are_not_plain_are_refused(path, item, message):
    write_program(program(item), path)
    assert_refused(path, message)


@FORMATS
@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"\xff.",
        b"\x80\x63}.",
        b"}",
        b".",
        b"(.",
        b"}h\x07.",
        b"}a.",
        b"K\x01K\x02K\x03s.",
        b"K\x01)R.",
        b"]]R.",
        b"\x96\x00\x00\x00\x00\x00\x00\x00\x40.",
        b"c\xff\n\xff\n.",
        b"Pid\n.",
        b"\x97.",
    ],
)
def test_pickles_that_are_none_are_refused(path, contents, archive):
    write_program(contents, path, archive)
    assert_refused(path, "")


@FORMATS
def test_storages_are_no_longer_than_their_data(path, archive):
    write({"x": torch.zeros(7)}, path, archive)
    contents = path.read_bytes()
    assert contents.count(literal(7)) >= 2
    path.write_bytes(contents.replace(literal(7), literal(9)))
    assert_refused(path, "")


@FORMATS
def test_a_damaged_file_is_read_or_refused(path, library, archive):
    contents = {"x": torch.zeros(4), "best": np.float64(1), "config": library.CfgNode({"a": 1})}
    write(contents, path, archive)
    forget(library)
    load_checkpoint(path)
    codecs.lookup("raw_unicode_escape")  # of an opcode for text
    modules, whole, chance = set(sys.modules), path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            assert isinstance(load_checkpoint(path), dict)
        except ValueError:
            refused += 1
    assert 0 < refused < 400
    assert set(sys.modules) == modules


def test_archives_of_torchscript_are_not_executed(path, monkeypatch):
    torch.jit.save(torch.jit.script(nn.ReLU()), path)
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("executed"))
    with pytest.raises(ValueError, match=r"holds a __torch__\..*ReLU, expected a dict"):
        load_checkpoint(path)


def test_tar_archives_are_not_unpacked(path, tmp_path, monkeypatch):
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name))
    monkeypatch.setattr(tarfile.TarFile, "extract", lambda *_, **__: pytest.fail("unpacked"))
    assert_refused(path, "")


def rewrite(path: Path, change: Callable[[str, bytes], tuple[str, bytes, int]]) -> None:
    """Writes an archive anew with other names, contents and compression of its records."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, contents in records.items():
            archive.writestr(*change(name, contents))


@pytest.mark.parametrize("record", ["data/0", "data.pkl", ".format_version"])
def test_zip_bombs_are_not_unpacked(path, record):
    write({"x": torch.zeros(4)}, path)
    megabytes = 200
    bomb = bytes(megabytes << 20)
    if record == "data.pkl":
        bomb = b"\x80\x02X" + len(bomb).to_bytes(4, "little") + bomb + b"."
    rewrite(
        path,
        lambda name, contents: (
            (name, bomb, zipfile.ZIP_DEFLATED)
            if name.endswith(record)
            else (name, contents, zipfile.ZIP_STORED)
        ),
    )
    assert path.stat().st_size < 1 << 20
    with_it = subprocess.run(
        [sys.executable, "-c", MEMORY_OF_LOADING, path], capture_output=True, text=True, check=True
    )
    assert int(with_it.stdout) < megabytes // 2


# What the process grows by, in megabytes
MEMORY_OF_LOADING = """
import resource, sys
from flash_internimage.checkpoint import load_checkpoint
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
try:
    load_checkpoint(sys.argv[1])
except ValueError:
    print(peak() - before)
"""


def test_records_that_overlap_are_refused(path):
    write({"x": torch.zeros(1 << 18)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        for i in range(100):
            twin = copy.copy(archive.getinfo("model/data/0"))
            twin.filename = f"model/data/{i + 1}"
            archive.filelist.append(twin)
        archive.writestr("model/more", b"")  # or the list is not written anew
    assert path.stat().st_size < 2 << 20
    assert_refused(path, "records of 105,9.* bytes in a file of 1,0")


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "model/../../evil"])
def test_records_go_nowhere(path, tmp_path, name):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    write({"x": torch.zeros(4)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"evil")
    path.rename(folder / "model.pth")
    assert load_checkpoint(folder / "model.pth")["x"].equal(torch.zeros(4))
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [folder / "model.pth"]
    assert not Path("/tmp/evil").exists()


def test_a_legacy_file_that_promises_too_much_is_refused(path):
    write({"x": torch.zeros(7)}, path, archive=False)
    contents = path.read_bytes()
    path.write_bytes(contents.replace(literal(7), literal(1 << 40)))
    assert_refused(path, "")


@FORMATS
def test_a_tensor_beyond_its_storage_is_refused(path, archive):
    write({"x": torch.zeros(4)}, path, archive)
    contents = path.read_bytes()
    size = literal(4) + pickle.TUPLE1
    assert contents.count(size) == 1
    path.write_bytes(contents.replace(size, literal(9) + pickle.TUPLE1))
    assert_refused(path, "")


def storage(elements: int, key: str = "0", view: bytes = b"") -> bytes:
    parts = literal("storage"), named("torch", "FloatStorage"), literal(key), literal("cpu")
    return pickle.MARK + b"".join(parts) + literal(elements) + view + pickle.TUPLE + b"Q"


def tensor(storage: bytes, size: int, stride: int) -> bytes:
    parts = literal(0), literal((size,)), literal((stride,)), literal(False), literal(None)
    return call(REBUILD, storage, *parts)


def test_storages_of_which_the_file_has_no_contents_are_refused(path):
    write_program(program(tensor(storage(64, view=literal(None)), 64, 1)), path, archive=False)
    assert_refused(path, "no contents")


def test_one_record_is_not_named_in_many_ways(path):
    write_program(program(tensor(storage(4, key="a"), 4, 1)), path)
    assert_refused(path, "no number")


def test_a_list_of_records_in_two_places_is_refused(path):
    write({"x": torch.zeros(4)}, path)
    contents = path.read_bytes()
    path.write_bytes(b"")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", b"")
    listed, end = path.read_bytes()[:-22], path.read_bytes()[-22:]
    path.write_bytes(contents + listed + end)
    assert_refused(path, "another place")


# Of few bytes, that grow to any size or take any time.
BOMBS = {
    "bytes": b"\x96" + (1 << 31).to_bytes(8, "little"),
    "copies of bytes": literal("8" * 10_000)  # as number 0
    + pickle.POP
    + pickle.MARK
    + (named("builtins", "bytearray") + b"h\x00\x85R") * 100
    + pickle.TUPLE,
    "copies of numbers": pickle.BINBYTES
    + (10_000).to_bytes(4, "little")
    + bytes(10_000)
    + b"q\x09"  # number 9
    + pickle.POP
    + pickle.MARK
    + call(
        named("numpy._core.multiarray", "scalar"),
        call(named("numpy", "dtype"), literal("S10000")) + b"h\x09",
    )
    * 100
    + pickle.TUPLE,
    "tuples as keys": b"}" + b")" + b"2\x86" * 60 + b"Ns",
    "depth as keys": b"}" + b")" + b"\x85" * 200_000 + b"Ns",
    "tuples in a set": call(named("builtins", "set"), b"]" + b")" + b"2\x86" * 60 + b"a"),
    "tuples in tuples": b")" + b"2\x86" * 60,
    "depth": b")" + b"\x85" * 200_000,
    "repeated elements": tensor(storage(1), 1 << 40, 0),
    "repeated in a set": call(named("builtins", "set"), tensor(storage(1), 1 << 22, 0)),
    "arguments": call(named("here", "Counts"), b")" + b"2\x86" * 60),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_what_grows_as_it_is_read_is_refused(path, kind):
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, record in {"data.pkl": program(BOMBS[kind]), "data/0": bytes(4)}.items():
        writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    with pytest.raises(ValueError, match=f"{path} is damaged or no checkpoint: .{{,500}}$"):
        load_checkpoint(path, types={"here.Counts": Counts})


def test_what_is_used_many_times_is_restored(path):
    once, text = [1, 2], "text" * 10
    contents = {"lists": [once] * 20, "texts": [text] * 1000, "bytes": [b"x" * 100] * 10}
    write({**contents, ("a", 1): torch.zeros(2, 3)[:, 1]}, path)
    loaded = load_checkpoint(path)
    assert loaded.pop(("a", 1)).equal(torch.zeros(2))
    assert loaded == contents
