"""Predict all sources of a process, and write the results."""

import json
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from tqdm import tqdm

from ..files import partial_path
from ..images import UnreadableImage
from ..predictions import Result
from .pictures import draw
from .predictor import Predictor
from .records import to_record
from .sources import VIDEOS, Source, read_rgb
from .writer import ResultWriter

# Threads that decode images while the model is busy.
_READERS = 2

# Rows of the legend in a video, at most: all of its frames have the same size.
_LEGEND_ROWS = 3

# Errors about a single source.
_SKIPPED = (ValueError, MemoryError, torch.OutOfMemoryError)


def predict_sources(
    predictor: Predictor,
    sources: Sequence[tuple[int, Source]],
    writer: ResultWriter,
    *,
    batch_size: int = 1,
    max_frames: int | None = None,
    progress: bool = True,
) -> None:
    """Predict images, videos and cameras, and write the results.

    Sources that cannot be read or predicted are noted with the reason, and skipped.

    Args:
        predictor: Model.
        sources: Positions among the sources of all processes, and sources.
        writer: Destination.
        batch_size: Images or frames per batch.
        max_frames: Frames per video or camera; None for all. Cameras go on until interrupted.
        progress: Whether to show a progress bar on terminals.

    Raises:
        OSError: If a result cannot be written.
        KeyboardInterrupt: If interrupted. Everything that was predicted is written.
    """
    disable = None if progress else True
    with tqdm(total=len(sources), desc="predict", unit="source", disable=disable) as bar:
        images = [(i, source) for i, source in sources if source.kind == "image"]
        for batch in _batches(_read_ahead(images, batch_size + _READERS), batch_size):
            _predict_images(predictor, batch, writer, bar)
        for index, source in sources:
            if source.kind == "image":
                continue
            try:
                frames = _predict_video(predictor, source, writer, batch_size, max_frames, disable)
            except _SKIPPED as error:
                _skip(writer, index, source, error)
            else:
                writer.add_video(index, source, frames)
            bar.update()


def _read_ahead(
    images: Iterable[tuple[int, Source]], ahead: int
) -> Iterator[tuple[int, Source, np.ndarray | UnreadableImage]]:
    """Read images in threads, at most `ahead` of them in advance."""
    waiting: deque[tuple[int, Source, Future[np.ndarray]]] = deque()
    with ThreadPoolExecutor(_READERS) as pool:
        remaining = iter(images)
        try:
            while True:
                for index, source in islice(remaining, ahead - len(waiting)):
                    future = pool.submit(read_rgb, str(source.path))
                    waiting.append((index, source, future))
                if not waiting:
                    return
                index, source, future = waiting.popleft()
                try:
                    yield index, source, future.result()
                except UnreadableImage as error:
                    yield index, source, error
        finally:
            pool.shutdown(cancel_futures=True)


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _predict_images(
    predictor: Predictor,
    batch: Sequence[tuple[int, Source, np.ndarray | UnreadableImage]],
    writer: ResultWriter,
    bar: tqdm,
) -> None:
    readable = [image for _, _, image in batch if isinstance(image, np.ndarray)]
    results = iter(predict_each(predictor, readable))
    for index, source, image in batch:
        result = image if isinstance(image, UnreadableImage) else next(results)
        if isinstance(image, UnreadableImage) or isinstance(result, Exception):
            _skip(writer, index, source, result)
        else:
            writer.add(index, source, image, result)
        bar.update()


def predict_each(predictor: Predictor, images: Sequence[np.ndarray]) -> list[Any]:
    """Predict images in a batch or, if that fails, one by one.

    Returns:
        For each image the result, or the error.
    """
    try:
        return predictor(images)
    except _SKIPPED as error:
        if len(images) == 1:
            return [error]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if len(images) == 1:
            return [MemoryError("not enough memory")]
    return [result for image in images for result in predict_each(predictor, [image])]


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory could not be allocated; on the CPU, PyTorch has no type for that."""
    typed = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return typed or "can't allocate memory" in str(error)


def _skip(writer: ResultWriter, index: int, source: Source, reason: object) -> None:
    text = " ".join(str(reason).split()) or type(reason).__name__
    path = " ".join(str(source.path).split())
    if path not in text:
        text = f"{path}: {text}"
    tqdm.write(f"skipped: {text}", file=sys.stderr)
    writer.skip(index, source, text)


def _predict_video(
    predictor: Predictor,
    source: Source,
    writer: ResultWriter,
    batch_size: int,
    max_frames: int | None,
    disable: bool | None,
) -> int:
    """Write the annotated video and the predictions of its frames, and return their number."""
    from .video import VideoReader, VideoWriter  # requires OpenCV

    reader = VideoReader(source)
    total = min(reader.frames or max_frames or 0, max_frames or reader.frames) or None
    legend_rows = min(_LEGEND_ROWS, len(predictor.classes))
    count = 0
    try:
        frames = tqdm(
            islice(reader, max_frames), source.file_name, total, unit="frame", leave=False,
            disable=disable,
        )  # fmt: skip
        with (
            frames,
            VideoWriter(writer.path(VIDEOS, source, ".mp4"), reader.fps) as video,
            _lines(writer.path(VIDEOS, source, ".jsonl")) as lines,
        ):
            for batch in _batches(frames, batch_size):
                for frame, result in zip(batch, predict_each(predictor, batch), strict=True):
                    if isinstance(result, Exception):
                        raise result
                    video.write(draw(frame, result, legend_rows=legend_rows))
                    lines.write(json.dumps(_frame_record(count, reader.fps, result)) + "\n")
                    count += 1
    except KeyboardInterrupt:
        if source.kind != "camera":
            raise
    finally:
        reader.close()
    return count


def _frame_record(number: int, fps: float, result: Result) -> dict[str, Any]:
    return {"frame": number, "seconds": round(number / fps, 3), **to_record(result)}


@contextmanager
def _lines(path: Path) -> Iterator[TextIO]:
    """Open a text file that appears when the block ends, even by an error, unless it is empty."""
    partial = partial_path(path)
    with open(partial, "w", encoding="utf-8") as file:
        try:
            yield file
        finally:
            file.close()
            if partial.stat().st_size:
                os.replace(partial, path)
            else:
                partial.unlink()
