"""Find the files of datasets in the format of PASCAL VOC."""

from pathlib import Path

from ..text_files import read_text
from .annotations import Dataset, Losses, find_images

_SPLITS = ("train", "val", "test")


def find_devkit(root: Path) -> Path:
    """Return the folder that contains Annotations, which may be one or two levels below."""
    for pattern in ("", "*", "*/*"):
        for folder in [root] if not pattern else sorted(root.glob(pattern)):
            if find_annotations(folder) or (folder / "SegmentationClass").is_dir():
                return folder
    return root


def find_annotations(root: Path) -> Path | None:
    """Return the folder of the annotations; some datasets have other names than VOC."""
    if (root / "Annotations").is_dir():
        return root / "Annotations"
    folder = root / "annotations"
    return folder if any(folder.rglob("*.xml")) else None


def find_stems(folder: Path, losses: Losses) -> dict[str, str]:
    """Return the relative paths of the images in a folder by their path without suffix."""
    stems: dict[str, str] = {}
    for name in find_images(folder):
        if stems.setdefault(name.rpartition(".")[0], name) != name:
            losses.add("images that differ only in their suffix left out", folder / name)
    return stems


def apply_image_sets(root: Path, kind: str, dataset: Dataset) -> None:
    """Distribute the images over the splits listed in ImageSets, and count the others."""
    folder = root / "ImageSets" / kind
    lists = {name: folder / f"{name}.txt" for name in _SPLITS}
    if not lists["train"].is_file() and (folder / "trainval.txt").is_file():
        lists["train"] = folder / "trainval.txt"
    if not any(path.is_file() for path in lists.values()):
        return
    images = {
        Path(item.name).with_suffix("").as_posix(): item for item in dataset.splits.pop("", [])
    }
    used = set()
    for split, path in lists.items():
        if not path.is_file():
            continue
        names = [
            words[0] for line in read_text(path, "replace").splitlines() if (words := line.split())
        ]
        if not names:
            dataset.losses.add("splits without images", path)
        for name in names:
            if name in images:
                dataset.splits.setdefault(split, []).append(images[name])
                used.add(name)
            else:
                dataset.losses.add(
                    "images of a split that are missing or left out", f"{path}: {name}"
                )
    for name in images.keys() - used:
        dataset.losses.add("images in no split left out", images[name].source)
