"""Semantic segmentation datasets that are validated before a run."""

import io
import os
from collections import Counter
from contextlib import redirect_stdout
from itertools import takewhile
from pathlib import Path

import numpy as np
from mmengine.registry import DATASETS

from ...files import check_no_loops
from ...images import UnreadableImage, read_size
from ..utils import log_info, log_warning
from .base import ReadableImages
from .files import find_missing, is_local
from .label_maps import IGNORED, Palettes, decode_labels, differing_sizes, open_label_map
from .transforms import check_size

with redirect_stdout(io.StringIO()):  # mmseg prints which optional packages are missing
    from mmseg.datasets import ADE20KDataset, BaseSegDataset

_CHECKED_AT_START = 200  # label maps; 512 x 683 pixels take about 4 ms each


@DATASETS.register_module()
class CheckedSegDataset(ReadableImages, BaseSegDataset):
    """mmseg's BaseSegDataset for custom data, validated before the run starts.

    In training, images without a label map are left out and counted. At test time
    (`test_mode=True`), all files must exist and, according to their headers, have the size of their
    counterpart: results on only some of them would be misleading. In both cases, up to 200 label
    maps spread over the dataset are checked for values outside the classes, the others when they
    are read.

    `ignore_index` is the value of ignored pixels in the files. It is read as 255, which is always
    ignored, so that transforms, heads, losses and metrics keep their defaults.

    Raises:
        FileNotFoundError: If a folder, the `ann_file`, images or label maps are missing.
        ValueError: If the classes or label maps cannot be used.
        OSError: If a symbolic link in the folder of the images leads back to a folder above it.
    """

    @classmethod
    def _load_metainfo(cls, metainfo: dict | None = None) -> dict:
        loaded = super()._load_metainfo(metainfo)
        classes = loaded.get("classes", ())
        names = isinstance(classes, list | tuple) and all(isinstance(c, str) for c in classes)
        if not names or not 2 <= len({*classes}) == len(classes) <= IGNORED:
            raise ValueError(
                f"metainfo['classes'] must be 2 to {IGNORED} different names or a file of names, "
                f"got {classes!r:.200}; for a single kind of object, add a class for the "
                "background, with its own number in the label maps: ('background', 'bolt')"
            )
        return loaded

    def load_data_list(self) -> list[dict]:
        """List and validate the images and label maps, leaving out what cannot be used."""
        kinds = {"reduce_zero_label": bool, "ignore_index": int}
        for name, kind in {**kinds, "img_suffix": str, "seg_map_suffix": str}.items():
            if type(getattr(self, name)) is not kind:
                raise ValueError(f"{name} must be {kind.__name__}, got {getattr(self, name)!r}")
        classes = len(self.metainfo["classes"])
        numbers = len(self.label_map or range(classes))  # number of classes in the files
        ignored = self.ignore_index - self.reduce_zero_label
        if 0 <= ignored < numbers:
            raise ValueError(
                f"ignore_index must not be a class, got {self.ignore_index}; the label maps have "
                f"{numbers} classes from {int(self.reduce_zero_label)} on"
            )
        self._check_sources()
        data_list = super().load_data_list()
        if self.ann_file:
            blank = os.path.join(self.data_prefix["img_path"], self.img_suffix)
            data_list = [info for info in data_list if info["img_path"] != blank]
        if not data_list:
            raise FileNotFoundError(
                f"no images (*{self.img_suffix}) in {self.source}{self._other_suffixes()}"
            )
        present = self._with_files(data_list)
        if self.test_mode:
            self._check_headers(present)
        for info in present:  # read by the transforms
            info["num_classes"] = classes
            info["numbers"] = numbers
            info["ignore_index"] = self.ignore_index
            info["test_mode"] = self.test_mode
            info["backend_args"] = self.backend_args
            if self.ignore_index != IGNORED:  # read by mmseg's own LoadAnnotations
                info["label_map"] = {**(self.label_map or {}), ignored: IGNORED}
        self._check_values(present)
        return present

    def _check_sources(self) -> None:
        for key in ("img_path", "seg_map_path"):
            folder = self.data_prefix.get(key)
            if folder is None and key == "seg_map_path" and self.test_mode:
                raise ValueError(
                    "data_prefix must have seg_map_path, the folder of the label maps; to segment "
                    "images without label maps, set type='BaseSegDataset' in the dataset and "
                    "format_only=True in the evaluator"
                )
            if folder is None or (self._is_local(folder) and not Path(folder).is_dir()):
                raise FileNotFoundError(f"folder not found: data_prefix[{key!r}] is {folder!r}")
        if not self.ann_file:
            if self._is_local(self.data_prefix["img_path"]):
                check_no_loops(self.data_prefix["img_path"])
        elif self._is_local(self.ann_file) and not Path(self.ann_file).is_file():
            raise FileNotFoundError(f"ann_file not found: {self.ann_file}")

    def _other_suffixes(self) -> str:
        """Return a hint that lists the suffixes in a folder without images."""
        if self.ann_file or not self._is_local(self.data_prefix["img_path"]):
            return ""
        found = Counter(Path(path).suffix for path in _files(self.data_prefix["img_path"]))
        names = ", ".join(f"{count} *{suffix}" for suffix, count in found.most_common(3))
        return names and f", but {names}: set img_suffix"

    def _is_local(self, path: str) -> bool:
        return is_local(path, self.backend_args)

    def _with_files(self, data_list: list[dict]) -> list[dict]:
        """Return the images that exist and have a label map, requiring all of them at test time."""
        paths = [(info["img_path"], info["seg_map_path"]) for info in data_list]
        missing = find_missing(path for pair in paths for path in pair if self._is_local(path))
        images = [image for image, _ in paths if image in missing]
        labels = [labels for _, labels in paths if labels in missing]
        present = [
            info for info, pair in zip(data_list, paths, strict=True) if missing.isdisjoint(pair)
        ]
        skipped, unused = self._unlisted(data_list)
        left_out = len(data_list) - len(present)
        if left_out and (self.test_mode or not present):
            hint = _suffix_hint(data_list, self.img_suffix) if labels and not present else ""
            raise FileNotFoundError(
                f"{left_out} of the {len(data_list)} images of {self.source} or their label maps "
                f"are missing, the first: {(images or labels)[0]}{hint}"
            )
        if self.test_mode and skipped:
            raise FileNotFoundError(
                f"{len(skipped)} images of {self.source} are not regular files, the first: "
                f"{skipped[0]}"
            )
        self.left_out = {
            "missing images": len(images),
            "images without a label map": left_out - len(images),
            "images that are not regular files": len(skipped),
            "label maps without an image": len(unused),
        }
        return present

    def _unlisted(self, data_list: list[dict]) -> tuple[list[str], list[str]]:
        """Return images that mmengine's listing skips, and label maps without an image.

        Raises:
            ValueError: If images with a label map have another suffix.
        """
        folder, label_folder = self.data_prefix["img_path"], self.data_prefix["seg_map_path"]
        if self.ann_file or not (self._is_local(folder) and self._is_local(label_folder)):
            return [], []

        def label_map(path: str) -> str:
            name = os.path.relpath(path, folder).removesuffix(self.img_suffix)
            return os.path.join(label_folder, name + self.seg_map_suffix)

        images, labels = _files(folder), _files(label_folder)
        # Broken links, for example.
        skipped = [p for p in images if p.endswith(self.img_suffix) and not os.path.isfile(p)]
        known = {info[key] for info in data_list for key in ("img_path", "seg_map_path")}
        known |= {*skipped, *map(label_map, skipped)}
        unused = {p for p in labels if p.endswith(self.seg_map_suffix)} - known
        suffix = "." + self.img_suffix.rpartition(".")[2]
        others = [
            path
            for path in sorted({*images} - known - unused)
            if label_map(os.path.splitext(path)[0] + suffix) in unused
        ]
        if others:
            raise ValueError(
                f"{len(others)} images of {folder} have label maps but do not end in img_suffix="
                f"{self.img_suffix!r}, the first: {others[0]}; rename them, or use one dataset "
                "per suffix"
            )
        return sorted(skipped), sorted(unused)

    def _check_headers(self, data_list: list[dict]) -> None:
        faults = [fault for info in data_list if (fault := self._header_fault(info))]
        if faults:
            raise ValueError(
                f"{len(faults)} of the {len(data_list)} images of {self.source} or their label "
                f"maps are unreadable or differ in size, the first: {faults[0]}"
            )

    def _header_fault(self, info: dict) -> str | None:
        paths = info["img_path"], info["seg_map_path"]
        if not all(map(self._is_local, paths)):
            return None
        try:
            image, labels = map(read_size, paths)
        except UnreadableImage as error:
            return str(error)
        try:
            check_size(info["img_path"], labels)
        except UnreadableImage:
            return differing_sizes(info, labels, image)
        return None

    def _check_values(self, data_list: list[dict]) -> None:
        """Check the values of label maps spread over the dataset, and log a summary."""
        some = data_list[:: -(-len(data_list) // _CHECKED_AT_START)]
        counts = np.zeros(256, np.int64)
        palettes, unreadable = Palettes(), []
        for info in some:
            try:
                image = open_label_map(info["seg_map_path"], self.backend_args)
            except UnreadableImage as error:
                if self.test_mode:
                    raise
                unreadable.append(error)
                continue
            counts += np.bincount(decode_labels(image, info).ravel(), minlength=256)
            palettes.add(image, info["seg_map_path"])
        if len(unreadable) == len(data_list):
            raise ValueError(
                f"none of the {len(data_list)} label maps of {self.source} can be used, the first: "
                f"{unreadable[0]}"
            )
        classes = self.metainfo["classes"]
        absent = [name for name, count in zip(classes, counts, strict=False) if not count]
        complete = len(some) == len(data_list)
        if complete and len(absent) == len(classes):
            raise ValueError(f"the label maps of {self.source} contain only ignored pixels")
        left_out = [f"{number} {what}" for what, number in self.left_out.items() if number]
        present = f"{len(classes) - len(absent)} of the {len(classes)} classes occur"
        if absent:
            present += f" (not {', '.join(absent[:5])}{', ...' * (len(absent) > 5)})"
        doubts = []
        if unreadable:
            doubts.append(f"{len(unreadable)} are unreadable")
        if len(classes) - len(absent) < 2:
            doubts.append(f"pixels must be class indices, and {IGNORED} is ignored")
        if self.reduce_zero_label and complete and counts[IGNORED] and classes[-1] in absent:
            doubts.append("reduce_zero_label=True ignores 0, and 1 is the first class")
        if palettes.others:
            doubts.append(
                f"{len(palettes.others)} have different colors for the same values, such as "
                f"{palettes.others[0]}"
            )
        facts = [
            f"{len(data_list)} images",
            f"left out: {', '.join(left_out) or 'nothing'}",
            f"{present} in {len(some)} label maps checked",
            *doubts,
        ]
        (log_warning if left_out or doubts else log_info)(f"{self.source}: {'; '.join(facts)}")


@DATASETS.register_module()
class CheckedADE20KDataset(CheckedSegDataset, ADE20KDataset):
    """mmseg's ADE20KDataset, validated as :class:`CheckedSegDataset` is."""


def _files(folder: str) -> list[str]:
    """Return the paths of all files below a folder, except hidden ones."""
    return [
        os.path.join(parent, name)
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if not name.startswith(".")
    ]


def _suffix_hint(data_list: list[dict], img_suffix: str) -> str:
    """Return a hint that names the suffixes to set, judging by the first image."""
    images = [os.path.basename(info["img_path"]) for info in data_list]
    if images[0].endswith(2 * img_suffix):
        return f"; ann_file must list names without the suffix {img_suffix!r}"
    folder = os.path.dirname(data_list[0]["seg_map_path"])
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    if not names:
        return ""
    stems = {name: _shared_stem(images[0], name) for name in names}
    closest = max(names, key=lambda name: len(stems[name]))
    image_suffix, suffix = (n.removeprefix(stems[closest]) for n in (images[0], closest))
    if not all(name.endswith(image_suffix) for name in images):
        return f"; that folder contains files like {closest}"
    return (
        f"; that folder contains {closest}: set img_suffix={image_suffix!r} and "
        f"seg_map_suffix={suffix!r}"
    )


def _shared_stem(one: str, other: str) -> str:
    """Return the common beginning of two names, without trailing separators."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(character for character, _ in same).rstrip("._-")
