"""Memory that emulated kernels access, with checks of bounds and alignment."""

import ctypes
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Addresses = npt.NDArray[np.int64]  # one per lane
Words = npt.NDArray[np.uint32]


class AccessError(RuntimeError):
    """A kernel accessed memory that it must not access."""


class Region:
    """Consecutive bytes of memory, starting at an address of the device."""

    def __init__(self, begin: int, content: npt.NDArray[np.uint8]) -> None:
        self.begin = begin
        self.content = content

    def __contains__(self, extent: tuple[int, int]) -> bool:
        begin, end = extent
        return self.begin <= begin and end <= self.begin + len(self.content)


def of_process(begin: int, size: int) -> Region:
    """Return memory of this process as memory of the device."""
    array = (ctypes.c_uint8 * size).from_address(begin)
    return Region(begin, np.ctypeslib.as_array(array))


class Memory:
    """Regions that loads, stores and reductions may access."""

    def __init__(self, regions: Iterable[Region]) -> None:
        self.regions = list(regions)

    def _find(self, addresses: Addresses, size: int) -> list[tuple[Region, npt.NDArray[np.intp]]]:
        """Split the accesses by region."""
        if (addresses % size).any():
            raise AccessError(f"an access of {size} bytes is not aligned")
        extent = int(addresses.min()), int(addresses.max()) + size
        for region in self.regions:
            if extent in region:
                return [(region, np.arange(len(addresses)))]
        if len(addresses) == 1:
            raise AccessError(f"{extent[0]:#x} to {extent[1]:#x} is out of bounds")
        return [
            (self._find(addresses[[i]], size)[0][0], np.array([i])) for i in range(len(addresses))
        ]

    def load(self, addresses: Addresses, size: int) -> Words:
        """Return (accesses, words) of zero-extended data."""
        data = np.zeros((len(addresses), max(size, 4)), np.uint8)
        for region, which in self._find(addresses, size):
            at = (addresses[which] - region.begin)[:, None] + np.arange(size)
            data[which[:, None], np.arange(size)] = region.content[at]
        return data.view(np.uint32)

    def store(self, addresses: Addresses, words: Words, size: int) -> None:
        data = np.ascontiguousarray(words).view(np.uint8)[:, :size]
        for region, which in self._find(addresses, size):
            at = (addresses[which] - region.begin)[:, None] + np.arange(size)
            region.content[at] = data[which]

    def add(self, addresses: Addresses, words: Words) -> None:
        """Add float32 numbers atomically, in the order of the lanes."""
        for i in range(len(addresses)):
            size = 4 * words.shape[1]
            (region, _), *_ = self._find(addresses[[i]], size)
            at = int(addresses[i]) - region.begin
            sums = region.content[at : at + size].view(np.float32)
            sums += words[i].view(np.float32)
