"""Report packages that belong to an extra of the distribution and are not installed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Import names of the packages of each extra.
EXTRAS = {
    "app": ("gradio",),
    "data": ("defusedxml", "pycocotools"),
    "diffusion": ("diffusers",),
    "export": ("onnx", "onnxruntime", "onnxscript", "torchao"),
    "openmmlab": ("mmengine", "mmcv", "mmdet", "mmseg", "faster_coco_eval", "cv2"),
    "openvino": ("openvino",),
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
        requirement = describe(error)
        if requirement is None:
            raise
        sys.stderr.write(f"error: {program} requires {requirement}\n")
        raise SystemExit(2) from error


def describe(error: ModuleNotFoundError) -> str | None:
    """Return the missing package and how to install its extra; None if it belongs to none."""
    extra = next((extra for extra, names in EXTRAS.items() if error.name in names), None)
    return extra and f"{error.name}: pip install 'flash-internimage[{extra}]'"
