"""Tests of the comparison of exported files with eager PyTorch."""

import numpy as np
import pytest
import torch
from torch import nn

from flash_internimage.export.models import ExportableClassifier, ExportableModel
from flash_internimage.export.verification import (
    Comparison,
    DifferenceError,
    Runtime,
    check,
    compare,
    match_objects,
    run_eager,
)


class Sum(nn.Module):
    """A model whose logits are the sums of the channels."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.sum((2, 3))


MODEL = ExportableClassifier(Sum())
IMAGES = torch.arange(12.0).view(1, 3, 2, 2)  # logits 6, 22 and 38


def compared(model: ExportableModel, runtime: Runtime) -> Comparison:
    """Compare a runtime with a model."""
    return compare(run_eager(model, IMAGES), runtime(IMAGES.numpy()), IMAGES.shape)


def test_differences_are_relative_to_the_largest_value():
    found = compared(MODEL, lambda x: {"logits": x.sum((2, 3)) + np.array([0, 0, 0.38])})
    assert found.shape == (1, 3, 2, 2)
    assert found.largest["logits"] == pytest.approx(0.01)
    assert found.mean["logits"] == pytest.approx(0.01 / 3)
    assert found.agreement == 1
    check([found], 0.011)
    with pytest.raises(DifferenceError, match="logits of 1 x 3 x 2 x 2 images must differ by at"):
        check([found], 0.009)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_an_output_that_is_not_finite_differs(wrong):
    found = compared(MODEL, lambda x: {"logits": x.sum((2, 3)) + np.array([wrong, 0, 0])})
    with pytest.raises(DifferenceError, match="got inf"):
        check([found], 1e9)


def test_other_classes_and_shapes_are_errors():
    swapped = compared(MODEL, lambda x: {"logits": x.sum((2, 3))[:, ::-1]})
    with pytest.raises(DifferenceError, match=r"must agree by at least 98%, got 0\.00%"):
        check([swapped], 1e9)
    with pytest.raises(DifferenceError, match=r"must have the shape \(1, 3\), got \(1, 2\)"):
        compared(MODEL, lambda x: {"logits": x.sum((2, 3))[:, :2]})


class Maps(ExportableModel):
    """A model whose output is a feature map."""

    outputs = ("stage1",)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (images,)


def test_feature_maps_have_no_agreement():
    found = compared(Maps(nn.Identity()), lambda x: {"stage1": x})
    assert found.agreement is None
    check([found], 1e-4)
    with pytest.raises(DifferenceError, match="stage1 of 1 x 3 x 2 x 2 images must differ"):
        check([compared(Maps(nn.Identity()), lambda x: {"stage1": -x})], 1e-4)


def objects(*items: tuple[float, float, int]) -> dict[str, np.ndarray]:
    """Return objects (x, score, label) of one image, whose boxes are (x, 0, x + 10, 10)."""
    x, scores, labels = (np.array(part) for part in zip(*items, strict=True))
    boxes = np.stack([x, 0 * x, x + 10, 0 * x + 10], axis=1)
    return {"boxes": boxes, "scores": scores, "labels": labels}


def test_objects_are_matched_by_label_and_box():
    expected = objects((0, 0.9, 1), (50, 0.5, 1), (50, 0.5, 2))
    actual = objects((0.25, 0.9, 1), (50, 0.5, 2), (50, 0.5, 1))
    left, right, agreement = match_objects(expected, actual)
    assert agreement == 1
    assert np.abs(left["boxes"] - right["boxes"]).max() == 0.25
    assert (left["scores"] == right["scores"]).all()


@pytest.mark.parametrize(
    "actual",
    [
        objects((0, 0.9, 1)),
        objects((0, 0.9, 1), (50, 0.5, 2)),
        objects((0, 0.9, 1), (52, 0.5, 1)),
        objects((0, 0.9, 1), (0, 0.9, 1)),
    ],
)
def test_missing_and_other_objects_lower_the_agreement(actual):
    _, _, agreement = match_objects(objects((0, 0.9, 1), (50, 0.5, 1)), actual)
    assert agreement == 0.5


def test_close_objects_are_matched_such_that_all_have_a_partner():
    # The first object is closest to the only possible partner of the second one.
    expected = objects((0, 0.9, 1), (0.5, 0.9, 1), (50, 0.8, 1), (50, 0.4, 1))
    actual = objects((0.3, 0.9, 1), (-0.6, 0.9, 1), (50, 0.4, 1), (50, 0.8, 1))
    left, right, agreement = match_objects(expected, actual)
    assert agreement == 1
    assert (left["scores"] == right["scores"]).all()


def test_objects_with_other_masks_lower_the_agreement():
    expected, actual = (objects((0, 0.9, 1), (50, 0.5, 1)) for _ in range(2))
    expected["masks"] = np.ones((2, 8, 8), bool)
    actual["masks"] = expected["masks"].copy()
    actual["masks"][0, 0, :3] = False  # IoU 61 / 64
    assert match_objects(expected, actual)[2] == 1
    actual["masks"][0, 0, 3] = False  # IoU 60 / 64
    assert match_objects(expected, actual)[2] == 0.5


class Nothing(ExportableClassifier):
    """A detector that finds no object."""

    outputs = ("boxes", "scores", "labels")

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.empty(0, 4), torch.empty(0), torch.empty(0, dtype=torch.long)


def test_images_without_objects_are_counted(caplog):
    model = Nothing(nn.Identity())
    nothing = {name: output.numpy() for name, output in model.run(IMAGES).items()}
    found = [compared(model, lambda _: nothing)] * 2
    check(found, 1e-4)
    assert "no objects in 2 of 2 batches" in caplog.text
    with pytest.raises(DifferenceError, match="must agree"):
        check([compared(model, lambda _: objects((0, 0.9, 1)))], 1e-4)
