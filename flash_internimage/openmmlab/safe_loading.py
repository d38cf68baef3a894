"""Safe loading of checkpoints, images and annotation files.

While enabled, it replaces entries of OpenMMLab's registries: mmengine's checkpoint loaders, and the
image transforms and COCO metrics of mmdet and mmseg. The datasets of this package also use the safe
image loader without it, see :class:`flash_internimage.openmmlab.datasets.base.ReadableImages`.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from mmengine.registry import Registry
from mmengine.runner import CheckpointLoader

from ..checkpoints import fetch_checkpoint, load_checkpoint
from .datasets.transforms import LoadCheckedArray, LoadCheckedImage
from .engine.runner.plain_state import restore_histories

# Tuples of registry, name and class; those of mmdet and mmseg are added where they are imported.
_overrides: list[tuple[Registry, str, type]] = []
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


def enable_safe_loading() -> None:
    """Make OpenMMLab read checkpoints, images and annotation files safely, process-wide.

    :class:`SafeRunner` does so while it works. Call this function before using the inference
    functions of mmdet and mmseg, or their own training and test scripts with mmengine's Runner:

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
        from flash_internimage.openmmlab import enable_safe_loading

        enable_safe_loading()
        model = init_detector(config, checkpoint, device='cpu')
        result = inference_detector(model, 'image.jpg')
    """
    _process.enter_context(safe_loading())


@contextmanager
def safe_loading() -> Iterator[None]:
    """Replace the entries within a block, and restore them when the outermost such block ends."""
    global _depth
    if _depth == 0:
        _originals.callback(setattr, CheckpointLoader, "_schemes", CheckpointLoader._schemes)
        CheckpointLoader._schemes = dict(CheckpointLoader._schemes)
        CheckpointLoader.register_scheme(("", "http://", "https://"), read_checkpoint, force=True)
        for override in _overrides:
            _replace(*override)
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _depth == 0:
            _originals.close()


def register_override(registry: Registry, name: str, override: type) -> None:
    """Register a class that safe loading uses in place of an entry of mmdet or mmseg."""
    _overrides.append((registry, name, override))
    if _depth:
        _replace(registry, name, override)


def register_image_loaders(transforms: Registry) -> None:
    """Register overrides for the image loaders of mmdet or mmseg."""
    register_override(transforms, "LoadImageFromFile", LoadCheckedImage)
    register_override(transforms, "LoadImageFromNDArray", LoadCheckedArray)
    register_override(transforms, "InferencerLoader", LoadCheckedArray)


def _replace(registry: Registry, name: str, override: type) -> None:
    modules = registry.module_dict
    if name in modules:
        _originals.callback(modules.__setitem__, name, modules[name])
    else:  # inherited from mmengine's registry
        _originals.callback(modules.pop, name)
    modules[name] = override
