"""Load files written by :func:`torch.save` with ``torch.load(weights_only=True)``, within bounds.

`torch.load` restricts which functions and types a file may use, but not how it uses them: a file of
1 kB can exhaust the memory or load forever. The pickles in a file are therefore interpreted first,
opcode by opcode, without creating any of their objects.
"""

import io
import math
import mmap
import os
import pickle
import pickletools
import re
import struct
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO, Self

import numpy as np
import torch
from torch._utils import IMPORT_MAPPING, NAME_MAPPING
from torch._weights_only_unpickler import _get_allowed_globals
from torch.storage import _dtype_to_storage_type_map


class _EqualToDict(type):
    """Metaclass of placeholders that makes them equal to dict.

    torch compares types with == and only sets items on dicts.
    """

    def __eq__(cls, other: object) -> bool:
        return cls is other or other is dict

    __hash__ = type.__hash__


class Placeholder(metaclass=_EqualToDict):
    """Stand-in for an object that is not restored; its arguments and items are dropped.

    Attributes:
        name: Qualified name of the class or function in the file, such as
            ``yacs.config.CfgNode``.
        state: State of the object in the file as plain data; None if it has none.
    """

    name = ""
    state: Any = None

    def __new__(cls, *args: Any) -> Self:
        """Create a placeholder, dropping the arguments of the object."""
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __repr__(self) -> str:
        return f"<{self.name}, not restored>"


_LOCK = threading.Lock()
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
_TUPLES = {"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
_DTYPES = {
    str(value): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype) and not str(value).startswith("torch.q")
}
_ITEM_SIZES = {"torch.storage.UntypedStorage": 1} | {
    f"torch.{name}": dtype.itemsize
    for dtype, name in _dtype_to_storage_type_map().items()
    if str(dtype) in _DTYPES
}
# torch.save uses the second for newer dtypes such as uint16.
_TENSORS = ["torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"]
_PARAMETER = "torch._utils._rebuild_parameter"
_BYTES = {"_codecs.encode", "builtins.bytes"}
_SCALARS = {"numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"}  # NumPy 1 and 2
_HASHED, _DICTS = _BYTES | _SCALARS, {"builtins.dict", "collections.OrderedDict"}
_ARRAYS = {"numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"}
# What torch allows by default and checkpoints need.
_OF_TORCH = {"_codecs.encode", "builtins.set", "collections.Counter", "collections.OrderedDict"}
_OF_TORCH |= {"torch.Size", "torch.device", _PARAMETER, *_TENSORS, *_DTYPES, *_ITEM_SIZES}
# What torch is told to allow in addition.
_ADMITTED: dict[str, Any] = {"builtins.bytes": bytes, "builtins.frozenset": frozenset}
_ADMITTED |= {"numpy.dtype": np.dtype, "numpy.ndarray": np.ndarray}
_ADMITTED |= dict.fromkeys(_SCALARS, np.float64(0).__reduce__()[0])
_ADMITTED |= dict.fromkeys(_ARRAYS, np.empty(0).__reduce__()[0])
# Classes of NumPy's dtypes, whose state is set. Files cannot refer to them by these names.
_ADMITTED |= {f"dtype {code}": type(np.dtype(code)) for code in "?bhilqBHILQefd"}


class _Name(str):
    """Name of a class or function in the file."""


class _Made:
    """Stand-in for a dict, a storage or the result of a call while a pickle is checked."""

    __match_args__ = ("name",)

    def __init__(self, name: str, *args: Any) -> None:
        self.name, self.args = name, args
        self.length = len(args[0]) if name == "_codecs.encode" else 0

    def __len__(self) -> int:
        return self.length


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


def _kind(value: Any) -> str:
    return value.name if type(value) is _Made else type(value).__name__


def _are(kind: type, *values: Any) -> bool:
    return all(type(value) is kind for value in values)


class _Check:
    """Interpreter of a file's pickles that requires them to contain plain data only.

    Args:
        size: Size of the file in bytes, which bounds the size of the loaded objects.
        records: Size in bytes of each record in a zip archive; None for the older format.
    """

    def __init__(self, size: int, records: dict[str, int] | None) -> None:
        self.left, self.records = 2 * size, records
        self.foreign: set[str] = set()
        self.storages: dict[str, _Made] = {}

    def run(self, file: Any) -> Any:
        """Interpret one pickle of a file or memory map and return a stand-in for its contents."""
        stack: list[Any] = []
        frames: list[list[Any]] = []
        memo: dict[int, Any] = {}
        operations: dict[str, Callable[..., Any]] = {
            **{"NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False},
            **{"EMPTY_LIST": list, "EMPTY_DICT": lambda: _Made("builtins.dict")},
            **{"APPEND": self.append, "APPENDS": self.append, "BINPERSID": self.storage},
            **{"SETITEM": self.set_items, "SETITEMS": self.set_items, "BUILD": self.build},
            **{"REDUCE": self.call, "NEWOBJ": partial(self.call, new=True)},
        }
        arg: Any
        for opcode, arg, _ in pickletools.genops(file):
            name, operands, slots = opcode.name, [], opcode.stack_before
            if pickletools.markobject in slots:
                operands, stack = stack, frames.pop()
                slots = slots[: slots.index(pickletools.markobject)]
            start = len(stack) - len(slots)
            _require(start >= 0, "its pickle has an operation on too few values")
            operands, stack[start:] = stack[start:] + operands, []
            if name == "STOP":
                return operands[0]
            if name == "MARK":
                frames.append(stack)
                stack = []
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[arg] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[arg])
            elif name in _LITERALS:
                stack.append(arg)
            elif name in _TUPLES:
                stack.append(tuple(operands))
            elif name in operations:
                stack.append(operations[name](*operands))
            elif name == "GLOBAL":
                stack.append(self.name(arg))
            else:
                problem = "its pickle must be of protocol 2, the default of torch.save, got the"
                _require(name == "PROTO" and arg <= 5, f"{problem} operation {name}")

    def spend(self, *parts: Any) -> None:
        """Count the copied elements, as a file can refer to one object many times."""
        sized = (str, list, tuple, _Made)
        self.left -= sum(len(part) for part in parts if isinstance(part, sized))
        _require(self.left >= 0, "its objects are larger than the file")

    def name(self, text: str) -> _Name:
        _require(bool(re.fullmatch(r"[\w.]+ [\w.]+", text)), f"{text!r:.100} is not a name")
        module, name = text.split(" ")
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        full = _Name(f"{module}.{name}")
        if full not in _ADMITTED and full not in _OF_TORCH:
            refused = full in _get_allowed_globals() or full.startswith("torch.")
            model = f"it contains a whole model ({full}): save its state_dict() instead"
            _require(not full.startswith("torch.nn.modules."), model)
            _require(not refused, f"{full} is not plain data")
            self.foreign.add(full)
            # torch searches all of them for every operation on one of them.
            _require(len(self.foreign) <= 100, "more than 100 classes that are not plain data")
        return full

    def append(self, target: Any, *items: Any) -> list:
        _require(_are(list, target), f"items added to a {_kind(target)}")
        target.extend(items)
        return target

    def set_items(self, target: Any, *items: Any) -> _Made:
        known = _kind(target) in self.foreign or _kind(target) in _DICTS
        _require(known and len(items) % 2 == 0, f"items added to a {_kind(target)}")
        self.require_keys(items[::2])
        target.length += len(items) // 2
        return target

    def require_keys(self, keys: list | tuple) -> None:
        """Require keys that are cheap to hash and rarely collide."""
        for key in keys:
            known = key is None or isinstance(key, str | float) or _kind(key) in _HASHED
            known = known or (isinstance(key, int) and abs(key) < 1 << 64)
            known = known or (_are(_Made, key) and key.name in self.foreign)
            _require(known, "dict keys and set members must be strings, bytes or numbers")

    def storage(self, pid: Any) -> _Made:
        view = () if self.records is not None else (None,)
        known = _are(tuple, pid) and len(pid) >= 5 and pid[0] == "storage" and pid[5:] == view
        parts: Any = pid[1:5] if known else [None] * 4
        kind, key, location, elements = parts
        known = known and _are(_Name, kind) and _are(str, key, location) and _are(int, elements)
        known = known and kind in _ITEM_SIZES and re.fullmatch("[0-9]+", key) and elements >= 0
        _require(bool(known), "a storage not described as torch.save does")
        made = _Made("storage", kind, size := elements * _ITEM_SIZES[kind])
        if self.records is None:
            _require("Untyped" not in kind, "torch reads this dtype from zip archives only")
            self.left -= 0 if key in self.storages else size
        known = self.left >= 0 if self.records is None else self.records.get(f"data/{key}") == size
        _require(known, f"storage {key} of {size:,} bytes is not in the file")
        same = self.storages.setdefault(key, made).args == made.args
        _require(same, f"conflicting descriptions of storage {key}")
        return made

    def call(self, name: Any, args: Any, new: bool = False) -> _Made:
        _require(
            _are(_Name, name) and _are(tuple, args),
            "its pickle calls an object that is not a function",
        )
        self.spend(args, *args)
        known = name in self.foreign or (not new and _is_known(name, *args))
        _require(known, f"{name} has arguments that torch.save does not write")
        if name in ("builtins.set", "builtins.frozenset"):
            self.require_keys(*args)
        return _Made(name, *args)

    def build(self, target: Any, state: Any) -> _Made:
        _require(_are(_Made, target), f"state set on a {_kind(target)}")
        self.spend(state, *(state if _are(tuple, state) else ()))
        match target.name, state:
            case "numpy.dtype", (3, "<" | ">" | "|", None, None, None, -1, -1, 0):
                known = True
            case name, (1, tuple() as sizes, _Made("numpy.dtype") as dtype, bool(), data):
                known = name in _ARRAYS and len(sizes) <= 32 and _are(int, *sizes)
                known = known and all(n >= 0 for n in sizes)
                known = known and _are_bytes(data, math.prod(sizes) * _item_size(dtype))
            case name, state:
                known = name == "collections.OrderedDict" and _kind(state) == "builtins.dict"
        _require(known or target.name in self.foreign, f"a {target.name} with unknown state")
        return target


def _is_known(name: str, *args: Any) -> bool:
    """Return whether torch.save writes such a call and its result does not exceed its arguments."""
    match (name, *args):
        case (
            ["collections.OrderedDict" | "builtins.bytes"]
            | ["collections.Counter", _Made("builtins.dict")]
            | ["builtins.set" | "builtins.frozenset", list()]
            | ["_codecs.encode", str(), "latin1"]
            | ["torch.device", str(), *_]
        ):
            return True
        case ["torch.Size", tuple() as sizes]:
            return _are(int, *sizes)
        case ["numpy.dtype", str() as code, False, True]:
            return bool(re.fullmatch("b1|[iu][1248]|f[248]", code))
        case [_, _Made("numpy.dtype") as dtype, data]:
            return name in _SCALARS and _are_bytes(data, _item_size(dtype))
        case [_, "numpy.ndarray", (0,), data]:
            return name in _ARRAYS and _are_bytes(data, 1)
        case [_, _Made() as tensor, bool(), hooks]:
            return name == _PARAMETER and tensor.name in _TENSORS and _are_hooks(hooks)
        case [_, _Made("storage") as storage, offset, sizes, strides, bool(), hooks, *dtype]:
            known = name in _TENSORS and _are_hooks(hooks) and len(dtype) == (name == _TENSORS[1])
            if known and _are(_Name, *dtype) and set(dtype) <= _DTYPES.keys():
                item_size = _DTYPES[dtype[0]].itemsize if dtype else _ITEM_SIZES[storage.args[0]]
                return _fits(storage.args[1] // item_size, offset, sizes, strides)
    return False


def _item_size(dtype: _Made) -> int:
    return int(dtype.args[0][1:])


def _are_bytes(data: Any, size: int) -> bool:
    return _are(_Made, data) and data.name in _BYTES and len(data) == size


def _are_hooks(hooks: Any) -> bool:
    """Return whether these are hooks as torch.save writes them; :func:`_finish` drops them."""
    return hooks is None or (_are(_Made, hooks) and hooks.name == "collections.OrderedDict")


def _fits(elements: int, offset: Any, sizes: Any, strides: Any) -> bool:
    """Return whether a tensor fits into its storage without repeated elements."""
    numbers = (offset, *sizes, *strides) if _are(tuple, sizes, strides) else (None,)
    if not (_are(int, *numbers) and all(0 <= n < 1 << 60 for n in numbers)):
        return False
    count = math.prod(sizes) if len(sizes) == len(strides) <= 64 else elements + 1
    last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=False))
    return last < elements and count <= elements if count else offset <= elements


def _read_archive(file: BinaryIO, size: int) -> tuple[bytes, dict[str, int]]:
    """Return the pickle in a zip archive, and the size in bytes of each record.

    Archives that torch's own reader might interpret differently are rejected.
    """
    file.seek(max(0, size - 98))
    tail = file.read()
    with zipfile.ZipFile(file) as archive:
        end, known = size - 22, tail[-22:-18] == b"PK\5\6" and tail[-2:] == bytes(2)
        listed, start = struct.unpack("<II", tail[-10:-2])
        if tail[-42:-38] == b"PK\6\7":  # zip64, which torch always writes
            end = size - 98
            listed, start, place = struct.unpack("<40xQQ8xQ26x", tail)
            known = known and place == end
        known = known and archive.start_dir == start == end - listed
        _require(known, "its central directory is not where its end record says")
        records = archive.infolist()
        folder = records[0].filename.partition("/")[0] + "/" if records else ""
        sizes = {record.filename.removeprefix(folder): record.file_size for record in records}
        _require("constants.pkl" not in sizes, "it is a TorchScript program")
        _require("data.pkl" in sizes, "a zip archive not written by torch.save")
        for record in records:
            known = record.filename.startswith(folder) and record.filename == record.orig_filename
            known = known and record.compress_type == zipfile.ZIP_STORED
            known = known and record.compress_size == record.file_size
            known = known and (size >= 1 << 32 or not record.extra)
            _require(known, f"record {record.filename!r:.100} is not stored plainly")
        total = sum(record.file_size for record in records)
        _require(total <= size, f"records of {total:,} bytes in a file of {size:,}")
        _require(len({name.lower() for name in sizes}) == len(records), "duplicate record names")
        if ".storage_alignment" in sizes:  # torch divides by it
            alignment = archive.read(f"{folder}.storage_alignment")
            known = bool(re.fullmatch(b"[1-9][0-9]{0,4}", alignment))
            _require(known, "its storage alignment is invalid")
        return archive.read(f"{folder}data.pkl"), sizes


def _check(file: BinaryIO, size: int) -> set[str]:
    """Check the pickles of a file and return the names of classes and functions to replace."""
    start = file.read(16)
    if start.startswith(b"PK\3\4"):
        program, records = _read_archive(file, size)
        check = _Check(size, records)
        check.run(io.BytesIO(program))
    else:
        problem = f"not a zip archive or a pickle, it begins with {start!r}"
        _require(start[:1] == pickle.PROTO, problem)
        check = _Check(size, None)
        # Unlike a file, a memory map does not allocate space for more bytes than it has.
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            known = check.run(mapped) == torch.serialization.MAGIC_NUMBER
            _require(known, "a pickle not written by torch.save")
            *_, keys = [check.run(mapped) for _ in range(4)]  # the third is the contents
        known = _are(list, keys) and _are(str, *keys) and sorted(keys) == sorted(check.storages)
        _require(known, "its list of storages does not match its contents")
    file.seek(0)
    return check.foreign


def _finish(contents: Any, limit: int) -> Any:
    """Drop tensor hooks and dict attributes, and reject endlessly nested containers."""
    # keeps the values alive, so that their ids are not reused
    seen: dict[int, tuple[Any, int, Any]] = {}
    total = 0  # number of items, counting repeated ones every time

    def finish(value: Any, depth: int = 0) -> Any:
        nonlocal total
        result, count, _ = seen.get(id(value), (value, 1, None))
        start, total = total, total + count
        _require(depth < 100 and total <= limit, "containers are nested too deeply")
        if id(value) in seen:
            return result
        if isinstance(value, _EqualToDict):
            result = value()
        elif isinstance(value, torch.Tensor):
            value._backward_hooks = None
        elif isinstance(value, Placeholder):
            value.state = finish(value.state, depth + 1)
        elif isinstance(value, dict):
            if type(value) is OrderedDict:
                vars(value).clear()  # such as _metadata, which complete state dicts do not need
            for key in value:
                value[key] = finish(value[key], depth + 1)
        elif isinstance(value, list):
            value[:] = [finish(item, depth + 1) for item in value]
        elif type(value) is tuple:
            result = tuple(finish(item, depth + 1) for item in value)
        else:
            return value
        seen[id(value)] = result, total - start, value
        return result

    return finish(contents)


def load(path: str | os.PathLike, map_location: Any) -> tuple[Any, list[str]]:
    """Load a file written by torch.save in either format, without executing or importing anything.

    During the call, `torch.load` in all threads allows what this function allows, and not what was
    registered by :func:`torch.serialization.add_safe_globals`.

    Args:
        path: File to read.
        map_location: See :func:`torch.load`.

    Returns:
        Tuple of the contents and the names of the classes and functions replaced by placeholders.

    Raises:
        Exception: Of any type, if the file is damaged or contains anything but plain data.
    """
    with open(path, "rb") as file, _LOCK:
        size = os.fstat(file.fileno()).st_size
        foreign = sorted(map(str, _check(file, size)))
        admitted: list[Any] = [(value, name) for name, value in _ADMITTED.items()]
        admitted += [(type(name, (Placeholder,), {"name": name}), name) for name in foreign]
        added = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            with torch.serialization.safe_globals(admitted):
                contents = torch.load(file, map_location, weights_only=True, mmap=False)
        finally:
            torch.serialization.add_safe_globals(added)
    return _finish(contents, size), foreign
