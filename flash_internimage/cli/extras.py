"""Report packages that belong to an extra of the distribution and are not installed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Import names of the packages of each extra.
EXTRAS = {
    "openmmlab": ("mmengine", "mmcv", "mmdet", "mmseg", "faster_coco_eval", "cv2", "pycocotools"),
    "train": ("contourpy", "matplotlib", "pydantic", "sklearn", "tensorboard"),
}


@contextmanager
def required_by(program: str) -> Iterator[None]:
    """Exit with code 2 and one line that names the extra if a package of an extra is missing.

    Args:
        program: What requires the package, for the message.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        extra = next((extra for extra, names in EXTRAS.items() if error.name in names), None)
        if extra is None:
            raise
        sys.stderr.write(
            f"error: {program} requires {error.name}: pip install 'flash-internimage[{extra}]'\n"
        )
        raise SystemExit(2) from error
