"""Draw the pictures of docs/gallery.md with the checkpoints that the demos trained.

python -m tools.gallery [classification] [detection] [segmentation] [sampling] [curves] [diffusion]
"""

import argparse
import contextlib
import csv
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from flash_internimage import extras
from flash_internimage.drawing import (
    contact_sheet,
    draw_detections,
    draw_label_map,
    side_by_side,
)
from flash_internimage.files import require_writable, write_atomically
from flash_internimage.inference import Detections, LabelMap, load_predictor, read_rgb
from flash_internimage.sampling import draw_sampling_points, last_of_stages

ROOT = Path(__file__).parents[1]
PROGRAM = "python -m tools.gallery"
LARGEST = 120_000  # bytes of a picture
WIDTH = 400  # of an image in pixels: two of them are as wide as a page
SCENES = 3

CLASSIFIER = ROOT / "configs/classification/flash_internimage_nano_digits.yaml"
DETECTOR = ROOT / "configs/detection/mask_rcnn_flash_internimage_nano_fpn_digits_scenes.py"
SEGMENTOR = ROOT / "configs/segmentation/upernet_flash_internimage_nano_digits_scenes.py"

# Folders of the demos in the output folder, and the commands that write them.
DEMOS = {
    "digits": "make demo",
    "digits-scenes": "make demo-detection",
    "digits-scenes-ade20k": "make demo-segmentation",
    "digits-diffusion": "make demo-diffusion",
}


def classification(output: Path, data: Path, to: Path) -> Path:
    """Draw images of the digits with their predictions, mistakes first."""
    files = sorted((data / "digits" / "val").glob("*/*.png"))
    images = [read_rgb(file) for file in files]
    predictor = load_predictor(CLASSIFIER, output / "digits" / "best.pth", top_k=1)
    results = predictor(images)
    truth = [file.parent.name for file in files]
    wrong = [i for i in range(len(files)) if results[i].names[0] != truth[i]]
    right = [i for i in range(len(files)) if i not in wrong]
    shown = [*wrong[:4], *_spread(right, 16 - len(wrong[:4]))]
    captions = []
    for i in shown:
        caption = f"{results[i].names[0]} ({100 * results[i].scores[0]:.0f} %)"
        captions.append(f"{caption}, is {truth[i]}" if i in wrong else caption)
    sheet = contact_sheet([images[i] for i in shown], captions, columns=8, cell_width=96)
    return _save(sheet, to / "gallery-classification.png")


def detection(output: Path, data: Path, to: Path) -> Path:
    """Draw annotations and predictions of some scenes."""
    predictor = load_predictor(DETECTOR, _latest(output / "digits-scenes"))
    scenes = _detection_scenes(data, predictor.classes)
    rows = []
    for (image, truth), result in zip(scenes, predictor([i for i, _ in scenes]), strict=True):
        before = draw_detections(image, truth, caption="Ground truth", min_width=WIDTH)
        after = draw_detections(image, result, caption="Prediction", min_width=WIDTH)
        rows.append(side_by_side([before, after]))
    return _save(_stack(rows), to / "gallery-detection.jpg")


def sampling(output: Path, data: Path, to: Path) -> Path:
    """Draw where the detector samples a scene for the center of an object."""
    predictor = load_predictor(DETECTOR, _latest(output / "digits-scenes"))
    image, truth = _detection_scenes(data, predictor.classes)[0]
    x, y = ((truth.boxes[0, :2] + truth.boxes[0, 2:]) / 2).astype(int).tolist()
    layer = last_of_stages(predictor)[2]
    picture = draw_sampling_points(predictor, image, layer, (x, y))
    return _save(picture, to / "gallery-sampling.jpg")


def _detection_scenes(data: Path, classes: tuple[str, ...]) -> list[tuple[np.ndarray, Detections]]:
    """Return scenes with objects, and their annotations without crowds."""
    from pycocotools.coco import COCO

    root = data / "digits-scenes"
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(root / "annotations" / "instances_val.json")
    categories = sorted(coco.cats)
    scenes = []
    for number in _spread(sorted({a["image_id"] for a in coco.anns.values()}), SCENES):
        image = read_rgb(root / "val" / coco.imgs[number]["file_name"])
        objects = coco.loadAnns(coco.getAnnIds(number, iscrowd=False))
        boxes = np.array([o["bbox"] for o in objects], np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        truth = Detections(
            boxes=boxes,
            scores=np.full(len(boxes), np.nan, np.float32),
            labels=np.array([categories.index(o["category_id"]) for o in objects], np.int64),
            masks=np.array([coco.annToMask(o) for o in objects], bool).reshape(
                -1, *image.shape[:2]
            ),
            classes=classes,
        )
        scenes.append((image, truth))
    return scenes


def segmentation(output: Path, data: Path, to: Path) -> Path:
    """Draw label maps and predictions of some scenes with several classes."""
    root = data / "digits-scenes-ade20k"
    maps = {}
    for path in sorted((root / "annotations" / "validation").glob("*.png")):
        labels = np.array(Image.open(path)) - np.uint8(1)  # 0 is ignored and becomes 255
        if len(np.unique(labels)) >= 3:
            maps[root / "images" / "validation" / f"{path.stem}.jpg"] = labels
    files = _spread(list(maps), SCENES)
    images = [read_rgb(file) for file in files]
    predictor = load_predictor(SEGMENTOR, _latest(output / "digits-scenes-ade20k"))
    rows = []
    for file, image, result in zip(files, images, predictor(images), strict=True):
        truth = LabelMap(maps[file], predictor.classes)
        before = draw_label_map(image, truth, caption="Ground truth", min_width=WIDTH)
        after = draw_label_map(image, result, caption="Prediction", min_width=WIDTH)
        rows.append(side_by_side([before, after]))
    return _save(_stack(rows), to / "gallery-segmentation.jpg")


def curves(output: Path, data: Path, to: Path) -> Path:
    """Plot the accuracies of the three demos over their training."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from flash_internimage.openmmlab.engine.hooks.curves import read_scalars

    with open(output / "digits" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    top1 = {int(row["epoch"]): float(row["val_top1"]) for row in rows}
    detector = read_scalars(output / "digits-scenes")
    segmentor = read_scalars(output / "digits-scenes-ade20k")
    panels = {
        ("Classification", "epoch", "top-1 accuracy (%)"): {"": top1},
        ("Detection", "epoch", "AP (%)"): {
            "boxes": _percent(detector["coco/bbox_mAP"]),
            "masks": _percent(detector["coco/segm_mAP"]),
        },
        ("Segmentation", "iteration", "mIoU (%)"): {"": segmentor["mIoU"]},
    }
    figure = Figure(figsize=(10, 3), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, ((title, x, y), lines) in zip(axes, panels.items(), strict=True):
        for label, line in lines.items():
            axis.plot(list(line), list(line.values()), marker=".", label=label)
        axis.set(title=title, xlabel=x, ylabel=y, xlim=(0, None), ylim=(0, 100))
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.grid(alpha=0.3)
        if any(lines):
            axis.legend()
    path = to / "gallery-curves.png"
    write_atomically(path, lambda file: figure.savefig(file, dpi=80, format="png"))
    return path


def diffusion(output: Path, data: Path, to: Path) -> Path:
    """Copy the samples of the diffusion models."""
    samples = read_rgb(output / "digits-diffusion" / "samples.png")
    return _save(samples, to / "gallery-diffusion.png")


def _percent(scalars: dict[int, float]) -> dict[int, float]:
    return {step: 100 * value for step, value in scalars.items()}


def _spread(items: Sequence, count: int) -> list:
    """Return a number of items, evenly spaced."""
    count = min(count, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def _latest(folder: Path) -> Path:
    from flash_internimage.openmmlab.engine.runner.checkpoint_names import latest_checkpoint

    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        raise ValueError(f"{folder} has no checkpoint epoch_*.pth or iter_*.pth")
    return checkpoint


def _stack(rows: list[np.ndarray]) -> np.ndarray:
    """Return pictures below each other."""
    return side_by_side([row.swapaxes(0, 1) for row in rows]).swapaxes(0, 1)


def _save(picture: np.ndarray, file: Path) -> Path:
    """Write a PNG, or a JPEG whose quality makes it small enough."""
    image = Image.fromarray(picture)
    if file.suffix == ".png":
        write_atomically(file, lambda stream: image.save(stream, "PNG", optimize=True))
        return file
    for quality in range(90, 40, -5):
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=quality, optimize=True)
        if encoded.tell() <= LARGEST:
            break
    write_atomically(file, lambda stream: stream.write(encoded.getbuffer()))
    return file


# Pictures, and the demos that they need.
PICTURES: dict[str, tuple[Callable[[Path, Path, Path], Path], list[str]]] = {
    "classification": (classification, ["digits"]),
    "detection": (detection, ["digits-scenes"]),
    "segmentation": (segmentation, ["digits-scenes-ade20k"]),
    "sampling": (sampling, ["digits-scenes"]),
    "curves": (curves, ["digits", "digits-scenes", "digits-scenes-ade20k"]),
    "diffusion": (diffusion, ["digits-diffusion"]),
}


def _missing(names: list[str], output: Path, data: Path) -> list[str]:
    """Return a line for each demo that has not been run."""
    needed = dict.fromkeys(demo for name in names for demo in PICTURES[name][1])
    lines = []
    for demo in needed:
        written = {"digits": "best.pth", "digits-diffusion": "samples.png"}
        paths = [output / demo / written.get(demo, "last_checkpoint")]
        if demo != "digits-diffusion":  # which reads its digits from scikit-learn
            paths.append(data / demo)
        for path in paths:
            if not path.exists():
                lines.append(f"{path} does not exist: run `{DEMOS[demo]}`")
                break
    return lines


def _name(text: str) -> str:
    if text not in PICTURES:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(PICTURES)}, got {text}")
    return text


def main(argv: list[str] | None = None) -> int:
    """Draw the pictures and return the exit code."""
    parser = argparse.ArgumentParser(PROGRAM, description=__doc__.splitlines()[0])
    parser.add_argument(
        "pictures",
        nargs="*",
        type=_name,
        metavar="PICTURE",
        help=f"{', '.join(PICTURES)} (default: all)",
    )
    parser.add_argument("--output", type=Path, default=ROOT / "output", help="the demos' folders")
    parser.add_argument("--data", type=Path, default=ROOT / "data", help="the demos' datasets")
    parser.add_argument("--to", type=Path, default=ROOT / "docs/images", help="where to write")
    arguments = parser.parse_args(argv)
    names = arguments.pictures or list(PICTURES)
    if missing := _missing(names, arguments.output, arguments.data):
        for line in missing:
            sys.stderr.write(f"{PROGRAM}: error: {line}\n")
        return 2
    require_writable(arguments.to, "--to")
    try:
        with extras.required_by(PROGRAM):
            arguments.to.mkdir(parents=True, exist_ok=True)
            for name in names:
                draw, _ = PICTURES[name]
                sys.stdout.write(f"{draw(arguments.output, arguments.data, arguments.to)}\n")
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{PROGRAM}: error: {' '.join(str(error).split())}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
