"""Base class of the datasets."""

import os
from typing import Any

from mmcv.transforms import LoadImageFromFile
from mmengine.dataset import BaseDataset

from .transforms import LoadCheckedImage


class ReadableImages(BaseDataset):
    """Base class of the datasets that reports image errors in one line with the file name.

    Args:
        args: Arguments of the dataset.
        kwargs: Keyword arguments of the dataset.

    Raises:
        ValueError: If `ann_file`, `data_root` or `data_prefix` is of the wrong type.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for name, kind, accepted in (
            ("ann_file", str | os.PathLike, "a path"),
            ("data_root", str | os.PathLike | None, "a path or None"),
            ("data_prefix", dict, "a dict"),
        ):
            if name in kwargs and not isinstance(kwargs[name], kind):
                raise ValueError(f"{name} must be {accepted}, got {kwargs[name]!r:.200}")
        super().__init__(*args, **kwargs)
        transforms = self.pipeline.transforms
        # Safe loading replaces the registry entry instead, see safe_loading.py. Pipelines that were
        # built while it is not enabled are changed here.
        for i, transform in enumerate(transforms):
            if type(transform) is LoadImageFromFile:
                transforms[i] = LoadCheckedImage()
                transforms[i].__dict__.update(transform.__dict__)

    def __getitem__(self, idx: int) -> dict:
        """Return an image after the pipeline or, in training, another one if it cannot be used.

        Raises:
            ValueError: If too many images in a row cannot be used.
        """
        try:
            return super().__getitem__(idx)
        except Exception as error:
            if type(error) is not Exception or self.test_mode:
                raise
            raise ValueError(
                f"{self.source}: none of {self.max_refetch + 1} images in a row can be used; see "
                "the warnings in the log"
            ) from error

    @property
    def source(self) -> str:
        """The file or folder that lists the images."""
        return self.ann_file or self.data_prefix["img_path"]
