"""Export the checkpoints of the three demos to every format, verified on images of the demos.

`make test-exports` trains the demos and runs this module, which takes minutes per format and is not
part of the suite. DEMO_FOLDER is a folder with `output` and `data` of the demos, by default the
checkout; to test a single format:

    DEMO_FOLDER=elsewhere python -m pytest tests/exports/demo_checkpoints.py -k onnx
"""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from flash_internimage.export import FORMATS, export_model
from flash_internimage.inference import load_predictor
from flash_internimage.inference.sources import read_rgb

ROOT = Path(os.environ.get("DEMO_FOLDER", Path(__file__).parents[2]))


@dataclass(frozen=True)
class Demo:
    """A demo.

    Attributes:
        target: Target of make that trains it.
        model: Name of the model.
        checkpoint: Checkpoint that it writes.
        images: Pattern of its images for the comparison.
    """

    target: str
    model: str
    checkpoint: str
    images: str

    def find(self, pattern: str) -> list[Path]:
        """Return the files that match a pattern; at least one must exist."""
        found = sorted(ROOT.glob(pattern))
        assert found, f"{ROOT / pattern} not found: run make {self.target}"
        return found


DEMOS = {
    "classification": Demo(
        "demo", "flash_internimage_nano_digits", "output/digits/best.pth", "data/digits/val/*/*.png"
    ),
    "detection": Demo(
        "demo-detection",
        "mask_rcnn_flash_internimage_nano_fpn_digits_scenes",
        "output/digits-scenes/epoch_20.pth",
        "data/digits-scenes/val/*.jpg",
    ),
    "segmentation": Demo(
        "demo-segmentation",
        "upernet_flash_internimage_nano_digits_scenes",
        "output/digits-scenes-ade20k/iter_2400.pth",
        "data/digits-scenes-ade20k/images/validation/*.jpg",
    ),
}
PAIRS = [(name, task) for name, chosen in FORMATS.items() for task in chosen.tasks]


def test_each_task_has_a_demo():
    assert {task for _, task in PAIRS} == {*DEMOS}


@pytest.mark.parametrize(("format_name", "task"), PAIRS)
def test_file_computes_what_the_checkpoint_computes(format_name, task, tmp_path):
    demo = DEMOS[task]
    [checkpoint] = demo.find(demo.checkpoint)
    files = demo.find(demo.images)
    images = [read_rgb(path) for path in files[:: len(files) // 4][:4]]
    path = tmp_path / f"model{FORMATS[format_name].suffix}"
    predictor = load_predictor(demo.model, checkpoint, device="cpu")
    report = export_model(predictor, path, format_name, images=images, timing=False)
    assert {file.stem for file in tmp_path.iterdir()} == {path.stem}  # OpenVINO writes two files
    assert len({comparison.shape for comparison in report.comparisons}) == 3
    assert not any(comparison.empty for comparison in report.comparisons)
    metadata = FORMATS[format_name].load_module().read_metadata(path)
    assert (metadata["task"], metadata["classes"]) == (task, [*predictor.classes])


@pytest.mark.parametrize("format_name", ["onnx", "torch-export", "aoti"])
def test_int8_file_has_the_classes_of_the_checkpoint(format_name, tmp_path):
    demo = DEMOS["classification"]
    [checkpoint] = demo.find(demo.checkpoint)
    calibration = [read_rgb(path) for path in demo.find("data/digits/train/*/*.png")[::10]]
    images = [read_rgb(path) for path in demo.find(demo.images)[::90]]
    path = tmp_path / f"model{FORMATS[format_name].suffix}"
    report = export_model(
        load_predictor(demo.model, checkpoint, device="cpu"),
        path,
        format_name,
        calibration=calibration,
        images=images,
        timing=False,
    )
    assert report.agreement >= 0.98
    assert report.size < 3.5e6  # 7 MB or more in float32
    if format_name == "aoti":  # layers in int8, not in float32 between conversions
        assert b"aoti_torch_cpu__qlinear_pointwise" in path.read_bytes()
