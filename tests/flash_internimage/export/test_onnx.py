"""Tests of the parts of detectors and segmentors in ONNX, which onnxruntime computes.

The files of whole models take minutes: `make test-exports`.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import batched_nms
from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from torch import Tensor, nn

from flash_internimage.export import onnx
from flash_internimage.export.deformable_encoder import grid_points, width_height
from flash_internimage.export.detectors import ExportableDetector, scale_boxes
from flash_internimage.export.formats import trace
from flash_internimage.export.models import Metadata
from flash_internimage.export.segmentors import AnySizeAveragePool
from flash_internimage.export.two_stage import extract, nms_by_group, paste

ROOT = Path(__file__).parents[3]
# As the models call them, with their own libraries as the reference.
DIVISOR, BINS, THRESHOLD = 32, 3, 0.1


@pytest.fixture(autouse=True)
def always_clean(one_thread, restore_scope):
    """Apply to all tests of this module."""


def random_boxes(count: int, limit: float) -> Tensor:
    """Return boxes (x1, y1, x2, y2) of various sizes."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2, count, 2, generator=generator) * limit
    return torch.cat([corners.amin(0), corners.amax(0)], dim=1)


class Parts(ExportableDetector):
    """The parts of detectors and segmentors that depend on the sizes of images or on the data."""

    outputs = ("padded", "points", "pooled", "corners", "regions", "kept", "pasted", "floors")
    dynamic_batch = False

    def __init__(self) -> None:
        super().__init__(nn.Module())
        self.model.data_preprocessor = SimpleNamespace(pad_size_divisor=DIVISOR)
        self.pool = AnySizeAveragePool(BINS)
        self.extractor = SingleRoIExtractor(
            {"type": "RoIAlign", "output_size": 4, "sampling_ratio": 0},
            out_channels=3, featmap_strides=[2, 4], finest_scale=10,
        )  # fmt: skip
        self.register_buffer("boxes", random_boxes(40, 48.0))
        self.register_buffer("scores", torch.rand(40, generator=torch.Generator()))
        self.register_buffer("groups", torch.arange(40) % 3)
        self.register_buffer("masks", torch.rand(40, 5, 5, generator=torch.Generator()))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        size = images.shape[2:]
        return (
            self.pad(images),
            grid_points(*size, images) / width_height(size, images),
            self.pool(images),
            scale_boxes(self.boxes / 48, size),
            extract(self.extractor, self.maps(images), self.boxes),
            nms_by_group(self.boxes, self.scores, self.groups, THRESHOLD, size),
            paste(self.masks, self.boxes, size),
            images[..., : -(-size[0] // 3), : (3 - size[1]) // -2],
        )

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return feature maps of two levels."""
        return [F.avg_pool2d(images, stride) for stride in (2, 4)]

    def eager(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the same by the libraries of the models."""
        height, width = images.shape[2:]
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        points = torch.stack([(x + 0.5) / width, (y + 0.5) / height], dim=-1).flatten(0, 1)
        center, extent = self.boxes[:, :2], self.boxes[:, 2:]
        corners = torch.cat([center - extent / 2, center + extent / 2], dim=1) / 48
        limits = torch.tensor([width, height, width, height])
        rois = torch.cat([self.boxes.new_zeros(40, 1), self.boxes], dim=1)
        nms = {"type": "nms", "iou_threshold": THRESHOLD}
        _, kept = batched_nms(self.boxes, self.scores, self.groups, nms)
        pasted, _ = _do_paste_mask(self.masks[:, None], self.boxes, height, width, skip_empty=False)
        return (
            F.pad(images, (0, -width % DIVISOR, 0, -height % DIVISOR)),
            points,
            F.adaptive_avg_pool2d(images, BINS),
            (corners * limits).clamp(min=0).minimum(limits),
            self.extractor(self.maps(images), rois),
            kept,
            pasted,
            images[..., : -(-height // 3), : (3 - width) // -2],
        )


@pytest.fixture(scope="module")
def parts() -> Parts:
    return Parts().eval()


@pytest.fixture(scope="module")
def path(parts, tmp_path_factory):
    metadata = Metadata("parts", "detection", (), parts.layout, parts.outputs, None, (), ())
    path = tmp_path_factory.mktemp("onnx") / "parts.onnx"
    onnx.write(trace(parts, 64, 80), metadata, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("size", [(64, 80), (70, 97), (49, 130)])
def test_parts_are_those_of_the_libraries(parts, path, size):
    images = torch.randn(1, 3, *size)
    actual = onnx.load(path)(images.numpy())
    for name, expected in parts.run(images).items():
        np.testing.assert_allclose(
            actual[name], expected.numpy(), rtol=1e-4, atol=1e-5, err_msg=name
        )


@pytest.mark.slow
def test_paths_of_the_machine_are_not_in_the_file(path):
    contents = path.read_bytes()
    assert b"grid_sample" in contents  # the names of nodes remain
    assert str(ROOT).encode() not in contents


def test_weights_beyond_a_single_file_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(onnx, "MAX_BYTES", 100)
    program = SimpleNamespace(state_dict={"weight": torch.zeros(26)}, constants={})
    with pytest.raises(ValueError, match=r"weights must have at most 100 bytes .* got 104"):
        onnx.write(program, None, tmp_path / "model.onnx")
    assert not [*tmp_path.iterdir()]
