"""Test the warning of images used for both training and validation."""

import pytest
from mmengine.dataset import BaseDataset, ConcatDataset, RepeatDataset

from flash_internimage.openmmlab.datasets.splits import warn_of_shared_images


class Images(BaseDataset):
    def load_data_list(self) -> list[dict]:
        return [{"img_path": path} for path in self.ann_file.split()]

    def _join_prefix(self) -> None:
        """Keep the paths unchanged."""


@pytest.fixture
def images(tmp_path):
    """Build datasets of images in two folders; b/link.png links to a/2.png, c to a."""
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b/link.png").symlink_to(tmp_path / "a/2.png")
    (tmp_path / "c").symlink_to(tmp_path / "a")
    return lambda names, **kwargs: Images(
        " ".join(str(tmp_path / name) for name in names.split()), **kwargs
    )


@pytest.mark.parametrize(
    ("train", "val", "shared"),
    [
        ("a/1.png a/2.png", "b/1.png b/2.png", 0),
        ("a/1.png a/2.png", "a/2.png b/2.png", 1),
        ("a/1.png a/2.png", "b/link.png b/1.png", 1),
        ("a/1.png a/2.png", "c/1.png c/2.png", 2),
        ("a/1.png b/../a/2.png", "a/1.png a/2.png", 2),
    ],
)
def test_shared_images_are_counted(train, val, shared, images, log):
    train, val = images(train), images(val)
    warn_of_shared_images(train, val)
    assert ("images of val_dataloader are also in" in log.text) == bool(shared)
    if shared:
        assert f"{shared} of the 2 images of val_dataloader" in log.text
        for wrapped in (RepeatDataset(train, 2), ConcatDataset([train, train])):
            log.clear()
            warn_of_shared_images(wrapped, val)
            assert f"{shared} of the 2 images of val_dataloader" in log.text


def test_disjoint_parts_of_one_file_are_not_shared(images, log):
    names = "a/1.png a/2.png b/1.png"
    warn_of_shared_images(images(names, indices=2), images(names, indices=-1))
    warn_of_shared_images(images(names), [{"inputs": 1}])
    warn_of_shared_images(None, images(names))
    assert "val_dataloader" not in log.text
