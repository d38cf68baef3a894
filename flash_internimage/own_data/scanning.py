"""Read many files in threads, with a progress bar."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
R = TypeVar("R")
_WORKERS = min(8, os.cpu_count() or 1)


def scan(
    function: Callable[[T], R], items: Sequence[T], title: str, workers: int | None = None
) -> Iterator[R]:
    """Yield the results of a function that reads files, in the order of the items.

    Decoders release Python's lock, so that threads use all cores. Only a few results are kept.

    Args:
        function: Reads the file or files of an item.
        items: Arguments of the function.
        title: Title of the progress bar, which is only shown on a terminal.
        workers: Number of threads; None for one per core, but at most 8.
    """
    workers = workers or _WORKERS
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(items), desc=title, disable=None, leave=False) as bar,
    ):
        waiting = iter(items)
        running = [pool.submit(function, item) for item in islice(waiting, 2 * workers)]
        while running:
            result = running.pop(0).result()
            running += [pool.submit(function, item) for item in islice(waiting, 1)]
            bar.update()
            yield result
