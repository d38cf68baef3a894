"""Read files of :func:`torch.save` with ``torch.load(weights_only=True)``, within bounds.

`torch.load` restricts what a file may name, but not what it may ask of the functions and types that
it admits: 1 kB can take all memory, or never end. The pickles of a file are therefore followed
first, operation by operation, without making any of their objects.
"""

import io
import math
import mmap
import os
import pickletools
import re
import struct
import threading
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, BinaryIO

import numpy as np
import torch
from torch._utils import IMPORT_MAPPING, NAME_MAPPING


class _EqualToDict(type):
    """Type of placeholders: torch compares types with ==, and sets items on dicts only."""

    def __eq__(cls, other: object) -> bool:
        return cls is other or other is dict

    __hash__ = type.__hash__


class Placeholder(metaclass=_EqualToDict):
    """Stand-in for an object that is not restored; its arguments and items are dropped.

    Attributes:
        name: What the file names, such as ``yacs.config.CfgNode``.
        state: The object's state in the file, as plain data; None if it has none.
    """

    name = ""
    state: Any = None

    def __new__(cls, *args):
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __repr__(self) -> str:
        return f"<{self.name}, not restored>"


class _Name(str):
    """A class or function that the file names."""


class _Made:
    """Stand-in for a dict, a storage, or the result of a call, while a pickle is checked."""

    def __init__(self, name: str, *args: Any):
        self.name, self.args, self.items = name, args, []

    def __len__(self) -> int:
        return len(self.items)


_ITEM_SIZES = {
    "torch.storage.UntypedStorage": 1,
    **{f"torch.{kind}Storage": 1 for kind in ("Bool", "Byte", "Char")},
    **{f"torch.{kind}Storage": 2 for kind in ("Short", "Half", "BFloat16")},
    **{f"torch.{kind}Storage": 4 for kind in ("Int", "Float")},
    **{f"torch.{kind}Storage": 8 for kind in ("Long", "Double", "ComplexFloat")},
    "torch.ComplexDoubleStorage": 16,
}
_DTYPES = {
    str(value): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype) and not str(value).startswith("torch.q")
}
_TENSORS = {f"torch._utils._rebuild_{kind}" for kind in ("tensor", "tensor_v2", "tensor_v3")}
_PARAMETERS = {f"torch._utils._rebuild_{kind}" for kind in ("parameter", "parameter_with_state")}
# What torch admits by itself and files need, and what it is told to admit.
_OF_TORCH = {"_codecs.encode", "torch.Size", "torch.Tensor", "torch.device", *_ITEM_SIZES}
_OF_TORCH |= {f"builtins.{kind}" for kind in ("bytearray", "complex", "set")}
_OF_TORCH |= {"collections.Counter", "collections.OrderedDict", *_TENSORS, *_PARAMETERS}
_OF_TORCH |= {_WITH_ATTRIBUTES := "torch._tensor._rebuild_from_type_v2"}
_ADMITTED = {"builtins.bytes": bytes, "builtins.frozenset": frozenset, **_DTYPES}
_ADMITTED |= {"numpy.dtype": np.dtype, "numpy.ndarray": np.ndarray}
for _core in ("core", "_core"):  # of numpy 1 and 2
    _ADMITTED[f"numpy.{_core}.multiarray.scalar"] = np.float64(0).__reduce__()[0]
    _ADMITTED[f"numpy.{_core}.multiarray._reconstruct"] = np.empty(0).__reduce__()[0]
# The types of dtypes, whose state is set; a file cannot name them so.
_ADMITTED |= {f"dtype {code}": type(np.dtype(code)) for code in "?bhilqBHILQefdgFDGSU"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LOCK = threading.Lock()


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


def _are(kind: type, *values: Any) -> bool:
    return all(type(value) is kind for value in values)


class _Check:
    """Follow the operations of a file's pickles as torch does, and require that they are plain.

    Args:
        size: Bytes in the file, which bound what is made of it.
        records: Bytes in the storages of a zip archive, by key; None for the older format.
    """

    def __init__(self, size: int, records: dict[str, int] | None):
        self.left, self.records = 2 * size, records
        self.foreign: set[str] = set()
        self.storages: dict[str, _Made] = {}

    def run(self, file: BinaryIO) -> Any:
        stack, frames, memo = [], [], {}
        for opcode, arg, _ in pickletools.genops(file):
            match opcode.name:
                case "PROTO" if arg <= 5:
                    pass
                case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                    stack.append(_CONSTANTS[opcode.name])
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                    stack.append(arg)
                case "BINUNICODE" | "SHORT_BINSTRING":
                    stack.append(arg)
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_DICT":
                    stack.append(_Made("builtins.dict"))
                case "MARK":
                    frames.append(stack)
                    stack = []
                case "TUPLE":
                    items, stack = stack, frames.pop()
                    stack.append(tuple(items))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    start = len(stack) - int(opcode.name[-1])
                    _require(start >= 0, "a tuple of too few items")
                    stack[start:] = [tuple(stack[start:])]
                case "APPENDS" | "SETITEMS":
                    items, stack = stack, frames.pop()
                    self.fill(stack[-1], items, opcode.name == "SETITEMS")
                case "APPEND" | "SETITEM":
                    start = -2 if opcode.name == "SETITEM" else -1
                    items, stack[start:] = stack[start:], []
                    self.fill(stack[-1], items, opcode.name == "SETITEM")
                case "BINPUT" | "LONG_BINPUT":
                    memo[arg] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    stack.append(memo[arg])
                case "GLOBAL":
                    stack.append(self.name(arg))
                case "BINPERSID":
                    stack.append(self.storage(stack.pop()))
                case "REDUCE" | "NEWOBJ":
                    args, name = stack.pop(), stack.pop()
                    stack.append(self.call(name, args, opcode.name == "NEWOBJ"))
                case "BUILD":
                    state = stack.pop()
                    self.build(stack[-1], state)
                case "STOP":
                    return stack.pop()
                case _:
                    raise ValueError(
                        f"operation {opcode.name} of its pickle must be one of protocol 2, which "
                        "torch.save writes unless told otherwise"
                    )

    def spend(self, *parts: Any) -> None:
        """Count what is copied, as a file can name one object many times."""
        sized = (str, list, tuple, _Made)
        self.left -= sum(len(part) for part in parts if isinstance(part, sized))
        _require(self.left >= 0, "its objects are larger than the file")

    def bytes(self, data: Any) -> int:
        """Return the number of bytes, and count them; -1 if these are none."""
        match data:
            case _Made(name="_codecs.encode", args=(str() as text, _)):
                self.spend(text)
                return len(text)
            case _Made(name="builtins.bytes"):
                return 0
        return -1

    def name(self, text: str) -> _Name:
        _require(bool(re.fullmatch(r"[\w.]+ [\w.]+", text)), f"{text!r:.100} is not a name")
        module, name = text.split(" ")
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = _Name(f"{module}.{name}")
        if full not in _ADMITTED and full not in _OF_TORCH:
            refused = module in ("os", "posix", "nt", "sys") or full.startswith("torch.")
            _require(not refused, f"{full} is not plain data")  # torch may admit it
            self.foreign.add(full)
            # For each operation on one of them, torch goes through all of them.
            _require(len(self.foreign) <= 100, "more than 100 classes that are not plain data")
        return full

    def fill(self, target: Any, items: list, pairs: bool) -> None:
        dicts = {"builtins.dict", "collections.OrderedDict", "collections.Counter", *self.foreign}
        known = _are(_Made, target) and target.name in dicts if pairs else _are(list, target)
        _require(known, f"items for a {getattr(target, 'name', type(target).__name__)}")
        if pairs:
            self.require_keys(items[::2])
            items = list(zip(items[::2], items[1::2], strict=True))
        (target.items if pairs else target).extend(items)

    def require_keys(self, keys: Iterable) -> None:
        """Require keys of which few have one hash, and whose hash takes no time."""
        for key in keys:
            match key:
                case str() | float() | None:
                    known = True
                case int():
                    known = abs(key) < 1 << 64
                case _Made(name=name, args=(_Made(args=(code, *_)), _)) if name in _ADMITTED:
                    known = re.fullmatch("[biuf][1248]|U.*", code)
                case _:
                    plain = {"_codecs.encode", "builtins.bytes", *self.foreign}
                    known = _are(_Made, key) and key.name in plain
            _require(bool(known), "keys and members of sets must be text, bytes or numbers")

    def storage(self, pid: Any) -> _Made:
        match pid, self.records:
            case ("storage", _Name() as kind, str() as key, str(), int() as elements, *view), _:
                known = kind in _ITEM_SIZES and re.fullmatch("[0-9]+", key) and elements >= 0
                known = known and view == ([] if self.records is not None else [None])
            case _:
                known = False
        _require(bool(known), "a storage that is not described as by torch.save")
        made = _Made("storage", elements, _ITEM_SIZES[kind])
        size = elements * _ITEM_SIZES[kind]
        if self.records is None:
            _require("Untyped" not in kind, "torch reads this dtype from zip archives only")
            self.left -= 0 if key in self.storages else size
        known = self.left >= 0 if self.records is None else self.records.get(key) == size
        _require(known, f"storage {key} of {size:,} bytes, which the file does not have")
        first = self.storages.setdefault(key, made)
        _require(first.args == made.args, f"two kinds of storage {key}")
        return made

    def call(self, name: Any, args: Any, new: bool) -> _Made:
        _require(_are(_Name, name) and _are(tuple, args), "a call of no function")
        self.spend(args, *args)
        known = name in self.foreign or (not new and self.is_known(name, args))
        _require(known, f"{name} is not called as by torch.save")
        return _Made(name, *args)

    def is_known(self, name: str, args: tuple) -> bool:
        match (name, *args):
            case (
                ["collections.OrderedDict" | "collections.Counter" | "builtins.bytes"]
                | ["collections.Counter", _Made(name="builtins.dict")]
                | ["_codecs.encode", str(), "latin1"]
                | ["builtins.bytearray", str(), "latin-1"]
                | ["builtins.complex", float(), float()]
                | ["torch.device", str()]
                | ["torch.device", str(), int()]
            ):
                return True
            case ["builtins.bytearray", data]:
                return self.bytes(data) >= 0
            case ["builtins.set" | "builtins.frozenset", list() as items]:
                self.require_keys(items)
                return True
            case ["torch.Size", tuple() as sizes]:
                return _are(int, *sizes)
            case ["numpy.dtype", str() as code, *flags]:
                plain = re.fullmatch(r"[biufcSU][0-9]{1,9}", code)
                return bool(plain) and flags == [False, True]
            case [_, _Made(name="numpy.dtype") as dtype, data] if name.endswith(".scalar"):
                return self.bytes(data) == _item_size(dtype)
            case [_, "numpy.ndarray", (0,), data] if name.endswith("._reconstruct"):
                return self.bytes(data) >= 0
            case [_, storage, offset, sizes, strides, *more] if name in _TENSORS:
                return _is_tensor(name, storage, offset, sizes, strides, more)
            case [_, _Name() as rebuild, "torch.Tensor", tuple() as inner, state] if (
                name == _WITH_ATTRIBUTES and rebuild in _TENSORS
            ):
                self.spend(inner, *inner)
                return self.is_known(rebuild, inner) and _are_attributes(state)
            case [_, _Made() as data, bool(), hooks, *state] if name in _PARAMETERS:
                known = data.name in {*_TENSORS, _WITH_ATTRIBUTES} and _are_hooks(hooks)
                with_state = name.endswith("_state")
                return known and len(state) == with_state and all(map(_are_attributes, state))
        return False

    def build(self, target: Any, state: Any) -> None:
        _require(_are(_Made, target), f"state for a {type(target).__name__}")
        match target.name, state:
            case name, _ if name in self.foreign:
                known = True
            case "collections.OrderedDict", _Made(name="builtins.dict"):
                self.spend(state)
                known = all(_are(str, key) for key, _ in state.items)
            case "numpy.dtype", (3, "<" | ">" | "|", None, None, None, size, int(), 0 | 8 as flags):
                kind = target.args[0][0]
                known = size == (_item_size(target) if kind in "SU" else -1)
                known = known and flags == (8 if kind == "U" else 0)  # as numpy writes them
            case _, (1, tuple() as sizes, _Made(name="numpy.dtype") as dtype, bool(), data):
                known = target.name.endswith("._reconstruct") and _are(int, *sizes)
                known = known and all(n >= 0 for n in sizes) and len(sizes) <= 32
                known = known and math.prod(sizes) * _item_size(dtype) == self.bytes(data)
            case _:
                known = False
        _require(known, f"state for a {target.name} that is not plain")


def _item_size(dtype: _Made) -> int:
    code = dtype.args[0]
    return int(code[1:]) * (4 if code[0] == "U" else 1)


def _are_hooks(hooks: Any) -> bool:
    """Whether these are hooks as torch.save writes them, which :func:`_finish` drops."""
    return hooks is None or (_are(_Made, hooks) and hooks.name == "collections.OrderedDict")


def _are_attributes(state: Any) -> bool:
    """Whether these are attributes that a tensor would not have otherwise."""
    return (_are(_Made, state) and state.name == "builtins.dict") and all(
        _are(str, key) and not hasattr(torch.nn.Parameter, key) for key, _ in state.items
    )


def _is_tensor(name: str, storage: Any, offset: Any, sizes: Any, strides: Any, more: list) -> bool:
    """Whether a tensor is within its storage, and no larger than it."""
    known = _are(_Made, storage) and storage.name == "storage" and _are(tuple, sizes, strides)
    if not known or not len(sizes) == len(strides) <= 64:
        return False
    numbers = (offset, *sizes, *strides)
    if not _are(int, *numbers) or not all(0 <= n < 1 << 60 for n in numbers):
        return False
    elements, item_size = storage.args
    if name.endswith("_v3"):
        if len(more) < 3 or more[2] not in _DTYPES:
            return False
        elements = elements * item_size // _DTYPES[more.pop(2)].itemsize
    match more:
        case []:
            known = name.endswith("_tensor")
        case [bool(), hooks, *metadata]:
            known = not name.endswith("_tensor") and _are_hooks(hooks) and len(metadata) <= 1
            known = known and all(data is None or _are(_Made, data) for data in metadata)
        case _:
            known = False
    last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    count = math.prod(sizes)
    return known and (last < elements and count <= elements if count else offset <= elements)


def _read_archive(file: BinaryIO) -> tuple[bytes, dict[str, int]]:
    """Return the pickle of a zip archive, and the sizes of its storages.

    Archives are refused of which torch's own reader of them might read something else.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(max(0, size - 98))
    tail = file.read()
    with zipfile.ZipFile(file) as archive:
        signature, listed, start, comment = struct.unpack("<4s8xIIH", tail[-22:])
        end, known = size - 22, signature == b"PK\5\6" and not comment
        if tail[-42:-38] == b"PK\6\7":  # the second form, for large files; torch always writes it
            end = size - 98
            short, (listed, start, place) = (listed, start), struct.unpack("<40xQQ8xQ26x", tail)
            known = known and place == end and short in ((listed, start), (0xFFFFFFFF,) * 2)
        known = known and archive.start_dir == start == end - listed
        _require(known, "its list of records is in another place than said")
        records, total = archive.infolist(), 0
        folder = records[0].filename.partition("/")[0] + "/" if records else ""
        names = {record.filename for record in records}
        _require(f"{folder}constants.pkl" not in names, "TorchScript is a program")
        for record in records:
            total += record.file_size
            known = record.filename.startswith(folder) and record.filename == record.orig_filename
            known = (
                known and record.compress_type == zipfile.ZIP_STORED and not record.flag_bits & 1
            )
            known = known and record.compress_size == record.file_size
            known = known and (size >= 1 << 32 or not record.extra)
            _require(known, f"record {record.filename!r:.100} is not plain")
        _require(total <= size, f"records of {total:,} bytes in a file of {size:,}")
        sizes = {record.filename: record.file_size for record in records}
        _require(len({name.lower() for name in sizes}) == len(records), "two records of one name")
        if (name := f"{folder}.storage_alignment") in sizes:  # by which torch divides
            known = bool(re.fullmatch(b"[1-9][0-9]{0,4}", archive.read(name)))
            _require(known, "storages without alignment")
        storages = {name.removeprefix(f"{folder}data/"): size for name, size in sizes.items()}
        return archive.read(f"{folder}data.pkl"), storages


def _check(file: BinaryIO) -> set[str]:
    """Check the pickles of a file, and return the classes and functions to replace."""
    size = os.fstat(file.fileno()).st_size
    if file.read(4) == b"PK\3\4":
        program, records = _read_archive(file)
        check = _Check(size, records)
        check.run(io.BytesIO(program))
    else:
        check = _Check(size, None)
        # Unlike a file, a mapped one makes no room for more bytes than there are.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            *_, keys = [check.run(mapped) for _ in range(5)]  # the fourth has the contents
        known = _are(list, keys) and _are(str, *keys) and sorted(keys) == sorted(check.storages)
        _require(known, "storages of which the file has no contents")
    file.seek(0)
    return check.foreign


def _finish(contents: Any, limit: int) -> Any:
    """Drop what a file adds to tensors and dicts, and refuse containers without end."""
    seen = {}  # with the value itself, or its id might become another's

    def finish(value: Any, depth: int = 0) -> tuple[Any, int]:
        """Return a value, and its number of items however often they are repeated."""
        if id(value) in seen:
            return seen[id(value)][:2]
        _require(depth < 100, "containers within containers without end")
        result, inner = value, []
        if isinstance(value, type) and issubclass(value, Placeholder):
            result = value()
        elif isinstance(value, torch.Tensor):
            value._backward_hooks = None
            vars(value).clear()
        elif isinstance(value, Placeholder):
            inner = [finish(value.state, depth + 1)]
            value.state = inner[0][0]
        elif isinstance(value, dict):
            if type(value) is OrderedDict:
                versions = vars(value).pop("_metadata", None)
                vars(value).clear()
                if _are_versions(versions):
                    value._metadata = versions
            inner = [finish(item, depth + 1) for item in value.values()]
            for key, (item, _) in zip(list(value), inner, strict=True):
                value[key] = item
        elif isinstance(value, list):
            inner = [finish(item, depth + 1) for item in value]
            value[:] = [item for item, _ in inner]
        elif type(value) is tuple:
            inner = [finish(item, depth + 1) for item in value]
            result = tuple(item for item, _ in inner)
        else:
            return value, 1
        count = 1 + sum(number for _, number in inner)
        _require(count <= limit, "containers within containers without end")
        seen[id(value)] = result, count, value
        return result, count

    return finish(contents)[0]


def _are_versions(metadata: Any) -> bool:
    """Whether this is what a state_dict says of its modules, which loading it depends on."""
    return _are(OrderedDict, metadata) and all(
        _are(str, name)
        and _are(dict, versions)
        and all(isinstance(value, int | None) for value in versions.values())
        for name, versions in metadata.items()
    )


def load(path: str | os.PathLike, map_location: Any) -> tuple[Any, list[str]]:
    """Load a file of torch.save, in either format, without executing or importing what it names.

    For the time of the call, `torch.load` admits in all threads what this function admits, and not
    what :func:`torch.serialization.add_safe_globals` has added.

    Args:
        path: File to read.
        map_location: As for :func:`torch.load`.

    Returns:
        The contents, and the names of what became placeholders.

    Raises:
        Exception: Of any kind, if the file is damaged or not plain.
    """
    with open(path, "rb") as file, _LOCK:
        foreign = sorted(map(str, _check(file)))
        admitted = [(value, name) for name, value in _ADMITTED.items()]
        admitted += [(type(name, (Placeholder,), {"name": name}), name) for name in foreign]
        added = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            with torch.serialization.safe_globals(admitted), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Detected pickle protocol")
                contents = torch.load(file, map_location, weights_only=True, mmap=False)
        finally:
            torch.serialization.add_safe_globals(added)
        size = os.fstat(file.fileno()).st_size
    return _finish(contents, size), foreign
