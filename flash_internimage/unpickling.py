"""Reading the files of torch.save with nothing in them imported or executed.

A pickle is a program that calls what it names. Here names are looked up in a table of what tensors,
numbers and plain containers are made of, and all other names give a :class:`Placeholder`.
"""

import os
import pickle
import re
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
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


def _bytes(data: str | bytes = b"", _encoding: str = "latin1") -> bytes:
    # latin1 is what pickle writes; the codec of another name would be imported
    return data if isinstance(data, bytes) else str.encode(data, "latin1")


def _dtype(name: str, *_) -> np.dtype:
    if not re.fullmatch(r"[biufcSU]\d{1,6}", name):
        raise pickle.UnpicklingError(f"numpy's dtype {name} is not one of numbers or text")
    return np.dtype(name, copy=True)  # the state changes its byte order


def _array(data: bytes, dtype: np.dtype, shape: tuple = (), order: str = "C", *_) -> np.ndarray:
    # numpy's own functions trust what the file says of memory; frombuffer does not
    if not isinstance(dtype, np.dtype):
        raise pickle.UnpicklingError(f"a numpy array of {dtype}")
    return np.frombuffer(data, dtype).reshape(shape, order=order)


_ADMITTED = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_ADMITTED |= {
    "_codecs.encode": _bytes,
    "builtins.bytearray": lambda *args: bytearray(_bytes(*args)),
    "builtins.bytes": _bytes,
    "builtins.complex": complex,
    "builtins.frozenset": frozenset,
    "builtins.set": set,
    "collections.Counter": Counter,
    "collections.OrderedDict": OrderedDict,
    "numpy._core.multiarray._reconstruct": lambda *_: np.empty(0),  # the state fills it
    "numpy._core.multiarray.scalar": lambda dtype, data: _array(data, dtype)[()],
    "numpy._core.numeric._frombuffer": _array,
    "numpy.dtype": _dtype,
    "numpy.ndarray": Placeholder("numpy.ndarray"),  # the kind for _reconstruct
    "torch.Size": torch.Size,
    "torch.Tensor": Placeholder("torch.Tensor"),  # the kind for _rebuild_from_type_v2
    # without the attributes that tensors were given
    "torch._tensor._rebuild_from_type_v2": lambda rebuild, kind, args, state: rebuild(*args),
    "torch._utils._rebuild_parameter_with_state": lambda data, grad, *_: nn.Parameter(data, grad),
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    "torch._utils._rebuild_tensor": torch._utils._rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": torch._utils._rebuild_tensor_v3,
    "torch.device": torch.device,
    "torch.storage.UntypedStorage": StorageType("ByteStorage"),
}


class _Unpickler(pickle._Unpickler):
    """Python's unpickler, in its form that lets opcodes be replaced.

    As in torch's weights_only, items and state go to plain objects alone: a file could otherwise
    write into tensors, and change functions and classes of this process.
    """

    admitted: Mapping[str, Any]
    replaced: set[str]

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
        super().load_binpersid()

    def load_newobj_ex(self) -> None:
        kwargs, args, kind = (self.stack.pop() for _ in range(3))
        self.append(kind(*args, **kwargs))

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is np.ndarray:
            _, shape, dtype, fortran, data = state
            array = _array(data, dtype, shape, "F" if fortran else "C")
            target.__setstate__(array.__reduce__()[2])
        elif isinstance(target, np.dtype):
            target.__setstate__(target.newbyteorder(state[1]).__reduce__()[2])
        elif type(target) in self.admitted.values():
            vars(target).update(state)
        elif type(target) is not Placeholder:
            raise pickle.UnpicklingError(f"state for a {type(target).__name__}")

    def fill(self, items: list) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update(zip(items[::2], items[1::2], strict=True))
        elif isinstance(target, list):
            target.extend(items)
        elif type(target) is not Placeholder:
            raise pickle.UnpicklingError(f"items for a {type(target).__name__}")

    dispatch = pickle._Unpickler.dispatch | {
        pickle.BINPERSID[0]: load_binpersid,
        pickle.NEWOBJ[0]: pickle._Unpickler.load_reduce,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build,
        pickle.APPEND[0]: lambda self: self.fill([self.stack.pop()]),
        pickle.APPENDS[0]: lambda self: self.fill(self.pop_mark()),
        pickle.SETITEM[0]: lambda self: self.fill([self.stack.pop(-2), self.stack.pop()]),
        pickle.SETITEMS[0]: lambda self: self.fill(self.pop_mark()),
    }


def _require_honest_sizes(file: BinaryIO) -> None:
    """torch.save compresses nothing: records of more than the file's size would be a zip bomb."""
    with zipfile.ZipFile(file) as archive:
        declared = sum(record.file_size for record in archive.infolist())
    size = os.fstat(file.fileno()).st_size
    if declared > size:
        raise pickle.UnpicklingError(f"records of {declared:,} bytes in a file of {size:,}")
    file.seek(0)


def load(
    path: str | os.PathLike, map_location: Any, types: Mapping[str, Callable]
) -> tuple[Any, list[str]]:
    """What torch.save wrote, and the names of what became placeholders.

    Sparse, quantized and nested tensors are among these; arrays of objects are refused.

    Args:
        path: of a file in either format of torch.save.
        map_location: of :func:`torch.load`.
        types: what to admit as well, by name. State becomes the attributes of a class's objects.

    Raises:
        Exception: of any kind, where the file is damaged or not one of torch.save.
    """
    replaced: set[str] = set()
    unpickler = type("_", (_Unpickler,), {"admitted": _ADMITTED | types, "replaced": replaced})
    pickle_module = SimpleNamespace(
        Unpickler=unpickler, load=lambda file, **kwargs: unpickler(file, **kwargs).load()
    )
    # These are the two readers of torch.load, which has a third one, for TorchScript.
    with open(path, "rb") as file:
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
    return contents, sorted(replaced)
