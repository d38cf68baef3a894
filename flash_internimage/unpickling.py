"""Reading the files of torch.save with nothing in them imported or executed.

A pickle is a program that calls what it names. Here names are looked up in a table of what tensors,
numbers and plain containers are made of, and all other names give a :class:`Placeholder`.
"""

import math
import os
import pickle
import re
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn
from torch.serialization import StorageType


class Placeholder:
    """Stands for an object that is not restored: takes arguments, state and items, and drops them.

    Attributes:
        name: what the file names, like yacs.config.CfgNode.
    """

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *args, **kwargs) -> "Placeholder":
        return Placeholder(self.name)

    def __repr__(self) -> str:
        return f"<{self.name}, not restored>"


def _dtype(name: str, *_) -> np.dtype:
    if not re.fullmatch(r"[biufcSU]\d{1,6}", name):
        raise pickle.UnpicklingError(f"numpy's dtype {name} is not one of numbers or text")
    return np.dtype(name, copy=True)  # the state changes its byte order


def _array(data: bytes, dtype: np.dtype, shape: tuple = (), order: str = "C", *_) -> np.ndarray:
    # numpy's own functions trust what the file says of memory; frombuffer does not
    if not isinstance(dtype, np.dtype):
        raise pickle.UnpicklingError(f"a numpy array of {type(dtype).__name__}")
    return np.frombuffer(data, dtype).reshape(shape, order=order)


class _Copies:
    """What is made of a file's bytes and text, which it can name many times."""

    def __init__(self, size: int):
        self.left = 2 * size  # an array's text becomes bytes, and these the array

    def count(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise pickle.UnpicklingError("more bytes than the file has")

    def encode(self, data: str | bytes = b"", _encoding: str = "latin1") -> bytes:
        self.count(len(data))
        # latin1 is what pickle writes; the codec of another name would be imported
        return data if isinstance(data, bytes) else str.encode(data, "latin1")

    def scalar(self, dtype: np.dtype, data: bytes) -> np.generic:
        self.count(len(data))
        return _array(data, dtype)[()]

    def admitted(self) -> dict[str, Callable]:
        return {
            "_codecs.encode": self.encode,
            "builtins.bytearray": lambda *args: bytearray(self.encode(*args)),
            "builtins.bytes": self.encode,
            "numpy._core.multiarray.scalar": self.scalar,
        }


def _within_storage(rebuild: Callable) -> Callable:
    """Of tensors that the storage does not hold, some readers make one of whatever is in memory.

    A tensor that repeats elements would be as large as the file says, wherever it is copied.
    """

    def checked(storage: Any, offset: int, size: tuple, stride: tuple, *args) -> torch.Tensor:
        dtypes = [arg for arg in args if isinstance(arg, torch.dtype)] or [storage.dtype]
        elements = storage._untyped_storage.nbytes() // dtypes[0].itemsize
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if 0 not in size and (last >= elements or math.prod(size) > elements):
            raise pickle.UnpicklingError(
                f"a tensor of {math.prod(size):,} elements, up to number {last:,}, of {elements:,}"
            )
        return rebuild(storage, offset, size, stride, *args)

    return checked


def _of_items(kind: type) -> Callable:
    """A container made of a plain one's items."""

    def make(items: list | tuple | dict = ()) -> Any:
        if type(items) not in (list, tuple, dict):
            raise pickle.UnpicklingError(f"a {kind.__name__} of a {type(items).__name__}")
        if type(items) is not dict:  # of which they are known
            _require_keys(item[0] if kind is OrderedDict else item for item in items)
        return kind(items)

    return make


def _require_keys(keys: Iterable) -> None:
    """Tuples within tuples as keys would take any time to compare, and any depth of the stack."""
    for key in keys:
        for part in key if type(key) is tuple else (key,):
            if not isinstance(part, _KEYS):
                raise pickle.UnpicklingError(f"a {type(part).__name__} in a key or a set")


_KEYS = (str, bytes, int, float, complex, type(None), np.generic, torch.dtype, Placeholder)
_ADMITTED = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_ADMITTED |= {
    "builtins.complex": complex,
    "builtins.frozenset": _of_items(frozenset),
    "builtins.set": _of_items(set),
    "collections.Counter": _of_items(Counter),
    "collections.OrderedDict": _of_items(OrderedDict),
    "numpy._core.multiarray._reconstruct": lambda *_: np.empty(0),  # the state fills it
    "numpy._core.numeric._frombuffer": _array,
    "numpy.dtype": _dtype,
    "numpy.ndarray": Placeholder("numpy.ndarray"),  # the kind for _reconstruct
    "torch.Size": torch.Size,
    "torch.Tensor": Placeholder("torch.Tensor"),  # the kind for _rebuild_from_type_v2
    # without the attributes that tensors were given
    "torch._tensor._rebuild_from_type_v2": lambda rebuild, kind, args, state: rebuild(*args),
    "torch._utils._rebuild_parameter_with_state": lambda data, grad, *_: nn.Parameter(data, grad),
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    "torch._utils._rebuild_tensor": _within_storage(torch._utils._rebuild_tensor),
    "torch._utils._rebuild_tensor_v2": _within_storage(torch._utils._rebuild_tensor_v2),
    "torch._utils._rebuild_tensor_v3": _within_storage(torch._utils._rebuild_tensor_v3),
    "torch.device": torch.device,
    "torch.storage.UntypedStorage": StorageType("ByteStorage"),
}


class _Unpickler(pickle._Unpickler):
    """Python's unpickler, in its form that lets opcodes be replaced.

    As in torch's weights_only, items and state go to plain objects alone: a file could otherwise
    write into tensors, and change functions and classes of this process.
    """

    admitted: Mapping[str, Any]
    copies: _Copies
    classes: tuple[type, ...]  # whose objects are made without arguments, and have state
    replaced: set[str]
    size: int  # of the file
    storages: set[str]  # the keys of those that the file names

    def find_class(self, module: str, name: str) -> Any:
        name = re.sub(r"^__builtin__\.", "builtins.", f"{module}.{name}")
        name = re.sub(r"^numpy\.core\.", "numpy._core.", name)
        if name in self.admitted:
            return self.admitted[name]
        self.replaced.add(name)
        return Placeholder(name)

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError(f"extension {code}, whose meaning is this process's")

    def load_binpersid(self) -> None:
        key = self.stack[-1]
        if type(key) is not tuple or key[:1] != ("storage",):  # for others torch writes patches
            raise pickle.UnpicklingError("a persistent id that is not a storage's")
        # the reader of archives finds other names in either case, one record under many names
        if not re.fullmatch("[0-9]+", key[2]):
            raise pickle.UnpicklingError("a storage whose name is no number")
        self.storages.add(key[2])
        super().load_binpersid()

    def call(self, kind: Callable, args: tuple, kwargs: dict) -> None:
        if kind in self.classes and (args or kwargs):
            raise pickle.UnpicklingError(f"arguments for a {kind.__name__}")
        self.append(kind(*args, **kwargs))

    def load_reduce(self) -> None:
        args, kind = (self.stack.pop() for _ in range(2))
        self.call(kind, args, {})

    def load_newobj_ex(self) -> None:
        kwargs, args, kind = (self.stack.pop() for _ in range(3))
        self.call(kind, args, kwargs)

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is np.ndarray:
            _, shape, dtype, fortran, data = state
            array = _array(data, dtype, shape, "F" if fortran else "C")
            self.copies.count(array.nbytes)
            target.__setstate__(array.__reduce__()[2])
        elif isinstance(target, np.dtype):
            target.__setstate__(target.newbyteorder(state[1]).__reduce__()[2])
        elif type(target) in (OrderedDict, Counter, *self.classes):
            vars(target).update(state)
        elif type(target) is not Placeholder:
            raise pickle.UnpicklingError(f"state for a {type(target).__name__}")

    def fill(self, items: list) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            _require_keys(items[::2])
            target.update(zip(items[::2], items[1::2], strict=True))
        elif isinstance(target, list):
            target.extend(items)
        elif isinstance(target, set):
            _require_keys(items)
            target.update(items)
        elif type(target) is not Placeholder:
            raise pickle.UnpicklingError(f"items for a {type(target).__name__}")

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self.fill(items)

    def load_frozenset(self) -> None:
        items = self.pop_mark()  # which changes where append leads
        self.append(_of_items(frozenset)(items))

    def load_bytearray8(self) -> None:
        size = int.from_bytes(self.read(8), "little")
        if size > self.size:
            raise pickle.UnpicklingError(f"{size:,} bytes in a file of {self.size:,}")
        self.append(bytearray(self.read(size)))

    dispatch = pickle._Unpickler.dispatch | {
        pickle.BINPERSID[0]: load_binpersid,
        pickle.BYTEARRAY8[0]: load_bytearray8,
        pickle.DICT[0]: load_dict,
        pickle.ADDITEMS[0]: lambda self: self.fill(self.pop_mark()),
        pickle.FROZENSET[0]: load_frozenset,
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_reduce,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build,
        pickle.APPEND[0]: lambda self: self.fill([self.stack.pop()]),
        pickle.APPENDS[0]: lambda self: self.fill(self.pop_mark()),
        pickle.SETITEM[0]: lambda self: self.fill([self.stack.pop(-2), self.stack.pop()]),
        pickle.SETITEMS[0]: lambda self: self.fill(self.pop_mark()),
    }


def _require_honest_sizes(file: BinaryIO) -> None:
    """torch.save compresses nothing: records of more than the file's size would be a zip bomb."""
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        # torch reads the directory where the file says it is, Python where the file ends
        if archive.start_dir != zipfile._EndRecData(file)[zipfile._ECD_OFFSET]:
            raise pickle.UnpicklingError("a directory of records in another place than said")
    declared = sum(record.file_size for record in records)
    if declared > size:
        raise pickle.UnpicklingError(f"records of {declared:,} bytes in a file of {size:,}")
    file.seek(0)


def _require_honest_containers(contents: Any, size: int, classes: tuple[type, ...]) -> None:
    """One container can be named many times: what looks at all of them would never end."""
    left, waiting = size, [(contents, 0)]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, (*classes, OrderedDict)):
            waiting.append((vars(value), depth + 1))
        if isinstance(value, Mapping):
            inner = list(value.values())
        elif isinstance(value, (list, tuple, set, frozenset)):
            inner = value
        else:
            continue
        left -= len(inner)
        if left < 0 or depth > 100:
            raise pickle.UnpicklingError("containers within containers without end")
        waiting.extend((item, depth + 1) for item in inner)


def load(
    path: str | os.PathLike, map_location: Any, types: Mapping[str, type]
) -> tuple[Any, list[str]]:
    """What torch.save wrote, and the names of what became placeholders.

    Sparse, quantized and nested tensors are among these; arrays of objects are refused.

    Args:
        path: of a file in either format of torch.save.
        map_location: of :func:`torch.load`.
        types: classes to admit as well, by name; what the file has of their objects becomes the
            attributes of new ones.

    Raises:
        Exception: of any kind, where the file is damaged or not one of torch.save.
    """
    # These are the two readers of torch.load, which has a third one, for TorchScript.
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        copies = _Copies(size)
        attributes = {
            "admitted": _ADMITTED | copies.admitted() | types,
            "copies": copies,
            "classes": tuple(types.values()),
            "replaced": set(),
            "size": size,
            "storages": set(),
        }
        unpickler = type("_", (_Unpickler,), attributes)
        plain: list[Any] = []  # what the older format has beside the contents
        pickle_module = SimpleNamespace(
            Unpickler=unpickler,
            load=lambda file, **kwargs: plain.append(unpickler(file, **kwargs).load()) or plain[-1],
        )
        archive = file.read(4) == b"PK\3\4"
        file.seek(0)
        if archive:
            _require_honest_sizes(file)
            reader, source = torch.serialization._load, torch._C.PyTorchFileReader(file)
        else:  # without a descriptor it is not taken for a tar archive, and unpacked
            methods = ("read", "readinto", "readline", "seek", "tell")
            source = SimpleNamespace(**{name: getattr(file, name) for name in methods})
            reader = torch.serialization._legacy_load
        contents = reader(source, map_location, pickle_module, encoding="utf-8")
    if not archive and not unpickler.storages <= set(plain[-1]):
        raise pickle.UnpicklingError("storages of which the file has no contents")
    _require_honest_containers(contents, size, unpickler.classes)
    return contents, sorted(unpickler.replaced)
