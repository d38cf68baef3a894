"""Tests that malicious and damaged checkpoints are rejected without executing anything."""

import codecs
import copy
import copyreg
import os
import pickle
import random
import sys
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from flash_internimage.checkpoints import Placeholder, load_checkpoint
from tests import processes
from tests.flash_internimage.checkpoints import (
    FORMATS,
    assert_refused,
    call,
    dotted,
    forget,
    literal,
    named,
    program,
    write,
    write_program,
)

SYSTEM = call(named("builtins", "__import__"), literal("os"))
MKDIR = named("posix", "mkdir")
# Each creates a file or folder with the given name when unpickled.
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
    pickle.loads(hostile)  # Unrestricted unpickling executes the call.
    assert marker.exists()
    marker.rename(tmp_path / "done")
    write_program(hostile, path, archive)
    with suppress(ValueError):
        assert isinstance(load_checkpoint(path)["item"], Placeholder)
    assert not marker.exists()


@FORMATS
def test_rebuild_functions_call_no_other_functions(path, tmp_path, archive):
    rebuild = named("torch._tensor", "_rebuild_from_type_v2")
    args = MKDIR, named("torch", "Tensor"), literal((str(tmp_path / "made"),)), literal({})
    write_program(program(call(rebuild, *args)), path, archive)
    assert_refused(path, "_rebuild_from_type_v2 is not plain data")
    assert not (tmp_path / "made").exists()


@FORMATS
@pytest.mark.parametrize(
    "item",
    [
        named("foreign_library", "CfgNode"),
        call(named("builtins", "__import__"), literal("foreign_library")),
    ],
)
def test_nothing_is_imported(path, library, item, archive):
    del sys.modules["foreign_library"]
    pickle.loads(program(item))
    assert sys.modules.pop("foreign_library")
    write_program(program(item), path, archive)
    assert isinstance(load_checkpoint(path)["item"], Placeholder)
    assert "foreign_library" not in sys.modules


def test_codecs_are_not_imported(path):
    encoded = call(named("_codecs", "encode"), literal("text"), literal("rot13"))
    write_program(program(encoded), path)
    sys.modules.pop("encodings.rot_13", None)
    assert_refused(path, "_codecs.encode has arguments that torch.save does not write")
    assert "encodings.rot_13" not in sys.modules


@pytest.mark.parametrize("opcode", [b"\x82\x7b", b"\x83\x7b\x00", b"\x84\x7b\x00\x00\x00"])
def test_registered_extensions_are_rejected(path, opcode):
    copyreg.add_extension("os", "mkdir", 0x7B)
    try:
        assert pickle.loads(program(opcode)) == {"item": os.mkdir}  # fills copyreg's cache
        write_program(program(opcode), path)
        assert_refused(path, "operation EXT")
    finally:
        copyreg.remove_extension("os", "mkdir", 0x7B)


REBUILD = named("torch._utils", "_rebuild_tensor_v2")


@FORMATS
@pytest.mark.parametrize(
    "target", [REBUILD, named("torch", "Size"), named("torch", "FloatStorage"), named("here", "X")]
)
def test_attributes_of_classes_and_functions_are_not_changed(path, target, archive):
    state = literal((None, {"changed": True}))
    write_program(program(target + state + pickle.BUILD), path, archive)
    with pytest.raises(ValueError, match=r"state set on a|unknown state"):
        load_checkpoint(path)
    assert not hasattr(torch._utils._rebuild_tensor_v2, "changed")


@pytest.mark.parametrize(
    "write_to", [literal(0) + literal(1) + pickle.SETITEM, literal(1) + pickle.APPEND]
)
def test_items_are_added_only_to_containers(path, write_to):
    array = literal(np.zeros(2))
    write_program(program(array + write_to), path)
    assert_refused(path, "items added to a numpy._core.multiarray._reconstruct")


@FORMATS
def test_source_code_is_not_compared(path, tmp_path, monkeypatch, archive):
    """For classes with dump_patches, torch's legacy reader writes a source diff to a file."""
    monkeypatch.chdir(tmp_path)
    cell = named("torch.nn", "Linear")
    key = pickle.MARK + literal("module") + cell + literal("a") + literal("b") + pickle.TUPLE
    write_program(program(key + pickle.BINPERSID), path, archive)
    assert_refused(path, "a storage not described|torch.nn.Linear is not plain data")
    assert os.listdir(tmp_path) == ["model.pth"]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (literal(np.array([None])), "numpy.dtype has arguments"),
        (literal(np.zeros(1, "i4,O")), "numpy.dtype has arguments"),
        (call(named("numpy", "dtype"), literal("i4,O")), "numpy.dtype has arguments"),
        (
            call(named("numpy._core.multiarray", "scalar"), literal("O"), literal(b"8" * 8)),
            "scalar has arguments",
        ),
        (literal(np.zeros(3)).replace(b"K\x03\x85", b"K\x04\x85"), "a numpy.* with unknown state"),
        (
            literal(np.float64(0.5)).replace(b"\x02\0\0\0f8", b"\x02\0\0\0f4"),
            "scalar has arguments",
        ),
    ],
)
def test_arrays_that_are_not_plain_are_rejected(path, item, message):
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
def test_invalid_pickles_are_rejected(path, contents, archive):
    write_program(contents, path, archive)
    assert_refused(path, "")


@FORMATS
def test_a_missing_memo_entry_is_reported_in_words(path, archive):
    write_program(b"}h\x07.", path, archive)
    assert_refused(path, "checkpoint: its pickle is incomplete$")


def test_storages_longer_than_their_record_are_rejected(path):
    write({"x": torch.zeros(7)}, path)
    claim = literal(7), literal(9)
    rewrite(path, lambda name, data: (name, data.replace(*claim), zipfile.ZIP_STORED))
    assert_refused(path, "storage 0 of 36 bytes is not in the file")


@FORMATS
def test_a_damaged_file_is_read_or_rejected(path, library, archive):
    contents = {"x": torch.zeros(4), "best": np.float64(1), "config": library.CfgNode({"a": 1})}
    write(contents, path, archive)
    forget(library)
    load_checkpoint(path)
    codecs.lookup("raw_unicode_escape")  # imports the codec of an opcode for text
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
    assert_refused(path, "it is a TorchScript program")


def test_tar_archives_are_not_unpacked(path, tmp_path, monkeypatch):
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.addfile(tarfile.TarInfo(name))
    monkeypatch.setattr(tarfile.TarFile, "extract", lambda *_, **__: pytest.fail("unpacked"))
    assert_refused(path, "")


def rewrite(path: Path, change: Callable[[str, bytes], tuple[str, bytes, int]]) -> None:
    """Rewrite an archive, changing the names, contents and compression of its records."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, contents in records.items():
            archive.writestr(*change(name, contents))


@pytest.mark.slow
def test_zip_bombs_are_not_unpacked(tmp_path):
    megabytes = 200
    bomb = bytes(megabytes << 20)
    text = b"\x80\x02X" + len(bomb).to_bytes(4, "little") + bomb + b"."
    paths = []
    for i, (record, contents) in enumerate(
        {"data/0": bomb, "data.pkl": text, ".format_version": bomb}.items()
    ):
        paths.append(tmp_path / f"{i}.pth")
        write({"x": torch.zeros(4)}, paths[-1])
        rewrite(
            paths[-1],
            lambda name, old, record=record, contents=contents: (
                (name, contents, zipfile.ZIP_DEFLATED)
                if name.endswith(record)
                else (name, old, zipfile.ZIP_STORED)
            ),
        )
        assert paths[-1].stat().st_size < 1 << 20
    process = processes.run("-c", MEMORY_OF_LOADING, *paths).checked()
    grown = [int(line) for line in process.stdout.split()]
    assert len(grown) == 3
    assert max(grown) < megabytes // 2


# Print by how many megabytes peak memory grows when each file is rejected.
MEMORY_OF_LOADING = """
import resource, sys
from flash_internimage.checkpoints import load_checkpoint
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
for path in sys.argv[1:]:
    before = peak()
    try:
        load_checkpoint(path)
    except ValueError:
        print(peak() - before)
"""


def test_overlapping_records_are_rejected(path):
    write({"x": torch.zeros(1 << 18)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        for i in range(100):
            twin = copy.copy(archive.getinfo("model/data/0"))
            twin.filename = f"model/data/{i + 1}"
            archive.filelist.append(twin)
        archive.writestr("model/more", b"")  # makes zipfile rewrite the central directory
    assert path.stat().st_size < 2 << 20
    assert_refused(path, "records of 105,9.* bytes in a file of 1,0")


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "model/../../evil"])
def test_records_are_not_extracted(path, tmp_path, name):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    write({"x": torch.zeros(4)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"evil")
    path.rename(folder / "model.pth")
    with suppress(ValueError):
        assert load_checkpoint(folder / "model.pth")["x"].equal(torch.zeros(4))
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [folder / "model.pth"]
    assert not Path("/tmp/evil").exists()


def test_a_legacy_file_shorter_than_its_storages_is_rejected(path):
    write({"x": torch.zeros(7)}, path, archive=False)
    contents = path.read_bytes()
    path.write_bytes(contents.replace(literal(7), literal(1 << 40)))
    assert_refused(path, "of 4,398,046,511,104 bytes is not in the file")


@FORMATS
def test_a_tensor_beyond_its_storage_is_rejected(path, archive):
    write({"x": torch.zeros(4)}, path, archive)
    contents = path.read_bytes()
    size = literal(4) + pickle.TUPLE1
    assert contents.count(size) == 1
    claim = size, literal(9) + pickle.TUPLE1
    if archive:
        rewrite(path, lambda name, data: (name, data.replace(*claim), zipfile.ZIP_STORED))
    else:
        path.write_bytes(contents.replace(*claim))
    assert_refused(path, "")


def storage(elements: int, key: str = "0", view: bytes = b"") -> bytes:
    parts = literal("storage"), named("torch", "FloatStorage"), literal(key), literal("cpu")
    return pickle.MARK + b"".join(parts) + literal(elements) + view + pickle.TUPLE + b"Q"


def tensor(storage: bytes, size: int, stride: int) -> bytes:
    parts = literal(0), literal((size,)), literal((stride,)), literal(False), literal(None)
    return call(REBUILD, storage, *parts)


def test_storages_without_contents_in_the_file_are_rejected(path):
    write_program(program(tensor(storage(64, view=literal(None)), 64, 1)), path, archive=False)
    assert_refused(path, "does not match its contents")


def test_alternative_names_of_a_record_are_rejected(path):
    write_program(program(tensor(storage(4, key="a"), 4, 1)), path)
    assert_refused(path, "a storage not described")


def test_two_central_directories_are_rejected(path):
    write({"x": torch.zeros(4)}, path)
    contents = path.read_bytes()
    path.write_bytes(b"")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", b"")
    listed, end = path.read_bytes()[:-22], path.read_bytes()[-22:]
    path.write_bytes(contents + listed + end)
    assert_refused(path, "not where its end record says")


SHARED = b")q\x01" + b"h\x01h\x01\x86q\x01" * 60
LONG_LIST = b"](" + b"K\x01" * 10_000 + b"eq\x01"
# Small pickles that would use unlimited memory or time.
BOMBS = {
    "bytes": b"\x96" + (1 << 31).to_bytes(8, "little"),
    "copies of bytes": literal("8" * 10_000)  # stored as memo 0
    + pickle.POP
    + pickle.MARK
    + (named("builtins", "bytearray") + b"h\x00\x85R") * 100
    + pickle.TUPLE,
    "copies of numbers": pickle.BINBYTES
    + (10_000).to_bytes(4, "little")
    + bytes(10_000)
    + b"q\x09"  # stored as memo 9
    + pickle.POP
    + pickle.MARK
    + call(
        named("numpy._core.multiarray", "scalar"),
        call(named("numpy", "dtype"), literal("S10000")) + b"h\x09",
    )
    * 100
    + pickle.TUPLE,
    "tuples as keys": b"}" + b")" + b"2\x86" * 60 + b"Ns",
    "depth as keys": b"}" + b")" + b"\x85" * 20_000 + b"Ns",
    "tuples in a set": call(named("builtins", "set"), b"]" + b")" + b"2\x86" * 60 + b"a"),
    "tuples in tuples": b")" + b"2\x86" * 60,
    "depth": b")" + b"\x85" * 20_000,
    "repeated elements": tensor(storage(1), 1 << 40, 0),
    "repeated in a set": call(named("builtins", "set"), tensor(storage(1), 1 << 22, 0)),
    "size of a tensor": call(named("torch", "FloatTensor"), literal(1 << 34)),
    "size of bytes": call(named("builtins", "bytearray"), literal(1 << 34)),
    "size of a storage": call(named("torch.storage", "UntypedStorage"), literal(1 << 34)),
    "size of a meta tensor": call(
        named("torch._utils", "_rebuild_meta_tensor_no_storage"),
        named("torch", "float32"),
        *map(literal, ((1 << 34,), (1,), False)),
    ),
    "size of an array": call(
        named("numpy._core.multiarray", "_reconstruct"),
        named("numpy", "ndarray"),
        *map(literal, ((1 << 34,), b"b")),
    ),
    "storage grown": tensor(storage(1), 1 << 32, 1),
    "storage claimed": tensor(storage(1 << 32), 1, 1),
    "strides overflowing": tensor(storage(1), 1 << 62, 1 << 62),
    "numpy's integers": call(
        REBUILD,
        storage(1),
        literal(np.int8(0)),
        *map(literal, ((127,), (1,), False, None)),
    ),
    "shared tuples": SHARED,
    "shared tuples as keys": b"}" + SHARED + b"Ns",
    "shared tuples in a set": call(named("builtins", "set"), b"]" + SHARED + b"a"),
    "shared lists": b"]q\x01" + b"]q\x02(h\x01h\x01eq\x01" * 60,
    "a list in itself": b"]q\x01h\x01a",
    "sets in sets": call(
        named("builtins", "set"), b"]" + call(named("builtins", "frozenset"), b"]") + b"a"
    ),
    "integers of one hash": b"}("
    + b"".join(literal(i * ((1 << 61) - 1)) + b"N" for i in range(3, 20_000))
    + b"u",
    "complex numbers of one hash": b"}("
    + b"".join(literal(complex(-1000003 * i, i)) + b"N" for i in range(5_000))
    + b"u",
    "copies of a list": LONG_LIST + b"](" + (named("builtins", "set") + b"h\x01\x85R") * 999 + b"e",
    "copies of arguments": LONG_LIST.replace(b"](", b"(").replace(b"eq", b"tq")
    + b"]("
    + (named("foreign", "f") + b"h\x01R") * 999
    + b"e",
    "names": b"]" + b"".join(named("foreign", f"f{i}") + b"a" for i in range(2000)),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_pickles_that_use_unlimited_resources_are_rejected(path, kind):
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, record in {"data.pkl": program(BOMBS[kind]), "data/0": bytes(4)}.items():
        writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    with pytest.raises(ValueError, match=f"{path} is damaged or not a checkpoint: .{{,500}}$"):
        load_checkpoint(path)


def test_shared_objects_are_restored(path):
    once, text = [1, 2], "text" * 10
    contents = {"lists": [once] * 20, "texts": [text] * 1000, "bytes": [b"x" * 100] * 10}
    write({**contents, "x": torch.zeros(2, 3)[:, 1]}, path)
    loaded = load_checkpoint(path)
    assert loaded.pop("x").equal(torch.zeros(2))
    assert loaded == contents


def test_tensor_hooks_are_dropped(path):
    hooks = (
        call(named("collections", "OrderedDict")) + literal(1) + named("builtins", "print") + b"s"
    )
    parts = storage(1), literal(0), literal((1,)), literal((1,)), literal(True), hooks
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, record in {"data.pkl": program(call(REBUILD, *parts)), "data/0": bytes(4)}.items():
        writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    loaded = load_checkpoint(path)["item"]
    assert loaded.requires_grad
    assert not loaded._backward_hooks


def test_attributes_of_dicts_are_dropped(path):
    state_dict = nn.Linear(1, 1).state_dict()
    state_dict.update = "not a method"
    write({"model": state_dict}, path)
    assert vars(load_checkpoint(path)["model"]) == {}


@pytest.mark.parametrize("size", [1 << 34, 100])
def test_sizes_in_extra_fields_are_rejected(path, size):
    """Readers treat the extra fields of ZIP64, for files over 4 GiB, differently."""
    write({"x": torch.zeros(4)}, path)
    rewrite(path, lambda name, contents: (name, contents, zipfile.ZIP_STORED))
    contents = path.read_bytes()
    start, end = contents.index(b"PK\1\2"), contents.rindex(b"PK\5\6")
    name = start + 46 + int.from_bytes(contents[start + 28 : start + 30], "little")
    extra = b"".join(n.to_bytes(k, "little") for n, k in ((1, 2), (16, 2), (size, 8), (size, 8)))
    listed = contents[start : start + 20] + b"\xff" * 8 + contents[start + 28 : start + 30]
    listed += b"\x14\0" + contents[start + 32 : name] + extra + contents[name:end]
    length = len(listed).to_bytes(4, "little")
    path.write_bytes(
        contents[:start] + listed + contents[end : end + 12] + length + contents[end + 16 :]
    )
    assert_refused(path, "record 'model/data.pkl' is not stored plainly")


@pytest.mark.parametrize("alignment", [b"0", b"-1", b"9" * 5000])
def test_invalid_alignments_are_rejected(path, alignment):
    write({"x": torch.zeros(4)}, path)
    rewrite(
        path,
        lambda name, contents: (
            name, alignment if name.endswith(".storage_alignment") else contents,
            zipfile.ZIP_STORED,
        ),
    )  # fmt: skip
    assert_refused(path, "its storage alignment is invalid")


def test_the_function_that_a_file_would_call_is_named(path):
    class Hostile:
        def __reduce__(self):
            return os.system, ("true",)

    torch.save({"state_dict": {}, "hostile": Hostile()}, path)
    with pytest.raises(ValueError, match=r"GLOBAL \w+\.system whose module \w+ is blocked$"):
        load_checkpoint(path)
