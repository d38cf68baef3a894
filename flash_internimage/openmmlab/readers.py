"""Safe readers of checkpoints, images and annotation files, in place of OpenMMLab's own."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from mmengine.registry import Registry
from mmengine.runner import CheckpointLoader

from ..checkpoints import fetch_checkpoint, load_checkpoint
from .datasets.transforms import LoadCheckedArray, LoadCheckedImage
from .engine.runner.plain_state import restore_histories

# Replacements as (registry, name, class); mmdet's and mmseg's are added where those are imported.
_readers: list[tuple[Registry, str, type]] = []
_depth = 0
_originals = ExitStack()
_process = ExitStack()


def read_checkpoint(source: str | os.PathLike, map_location: Any = "cpu") -> dict:
    """Load a checkpoint of mmengine or another program without executing anything in it.

    Args:
        source: Path, URL or name, see :func:`flash_internimage.checkpoints.fetch_checkpoint`.
        map_location: See :func:`torch.load`.

    Raises:
        FileNotFoundError: If the checkpoint does not exist.
        ValueError: If it is damaged or not a checkpoint.
    """
    checkpoint = load_checkpoint(fetch_checkpoint(source), map_location)
    restore_histories(checkpoint, source)
    return checkpoint


def use_safe_readers() -> None:
    """Make OpenMMLab read checkpoints, images and annotation files safely, process-wide.

    :class:`SafeRunner` does so while it works. Call this function before using the inference
    functions of mmdet and mmseg, or their own training and test programs with mmengine's Runner:

    - Nothing in a checkpoint is executed, whether it is passed to the inference functions or given
      by `init_cfg`.
    - With `flash_internimage.openmmlab.detection` or `.segmentation` imported, now or later, the
      transforms `LoadImageFromFile`, `LoadImageFromNDArray` and `InferencerLoader` reject files
      that are not images, read 16-bit grayscale in its full range, and rotate photographs as their
      annotations require.
    - With `flash_internimage.openmmlab.detection` imported, the metrics `CocoMetric` and
      `FasterCocoMetric` validate their annotation file.

    Example::

        from mmdet.apis import inference_detector, init_detector
        from flash_internimage.openmmlab import use_safe_readers

        use_safe_readers()
        model = init_detector(config, checkpoint, device='cpu')
        result = inference_detector(model, 'image.jpg')
    """
    _process.enter_context(safe_readers())


@contextmanager
def safe_readers() -> Iterator[None]:
    """Use the safe readers within a block and restore OpenMMLab's when the last such block ends."""
    global _depth
    if _depth == 0:
        _originals.callback(setattr, CheckpointLoader, "_schemes", CheckpointLoader._schemes)
        CheckpointLoader._schemes = dict(CheckpointLoader._schemes)
        CheckpointLoader.register_scheme(("", "http://", "https://"), read_checkpoint, force=True)
        for reader in _readers:
            _replace(*reader)
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0:
            _originals.close()


def add_reader(registry: Registry, name: str, reader: type) -> None:
    """Add a class that the safe readers register under an existing name of mmdet or mmseg."""
    _readers.append((registry, name, reader))
    if _depth:
        _replace(registry, name, reader)


def add_image_loaders(transforms: Registry) -> None:
    """Add the image loaders for the transforms of mmdet or mmseg."""
    add_reader(transforms, "LoadImageFromFile", LoadCheckedImage)
    add_reader(transforms, "LoadImageFromNDArray", LoadCheckedArray)
    add_reader(transforms, "InferencerLoader", LoadCheckedArray)


def _replace(registry: Registry, name: str, reader: type) -> None:
    modules = registry.module_dict
    if name in modules:
        _originals.callback(modules.__setitem__, name, modules[name])
    else:  # inherited from mmengine's registry
        _originals.callback(modules.pop, name)
    modules[name] = reader
