"""Evaluate released checkpoints and compare the results with the published results."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.zoo import Entry, Figure, to_figures
from ..classification.data import spread
from ..classification.evaluation import evaluate_checkpoint
from ..classification.model import pick_device

# Accepted difference of a measured from a published result, in percentage points. Published results
# are rounded to 0.1, and the kernel used for them mixed up some pixels of the images in a batch.
TOLERANCE = 0.2

# Number of images in the complete datasets.
IMAGES = {"classification": 50_000, "detection": 5_000, "segmentation": 2_000}


def evaluate(
    name: str,
    entry: Entry,
    checkpoint: Path,
    data: Path,
    *,
    device: str = "auto",
    limit: int | None = None,
    tta: bool = False,
    work_dir: Path | None = None,
) -> tuple[dict[Figure, float], int]:
    """Evaluate a checkpoint on a dataset.

    Args:
        name: Name of the entry.
        entry: Entry of the zoo.
        checkpoint: Checkpoint to evaluate.
        data: Root of ImageNet, COCO or ADE20K.
        device: Device to use; 'auto' selects the accelerator if there is one.
        limit: Maximum number of images, evenly spaced; None for all.
        tta: Evaluate a segmentor multi-scale, with and without flip.
        work_dir: Folder for OpenMMLab's logs; None for output/zoo/NAME.

    Returns:
        Tuple of the metrics in percent and the number of images.
    """
    if entry.task == "classification":
        model = str(entry.config_path) if entry.config else name
        result = evaluate_checkpoint(
            model, checkpoint=checkpoint, data=data, limit=limit, device=device
        )
        return {"top1": result["top1"]}, result["images"]

    from ..openmmlab.cli.common import build_runner
    from ..openmmlab.cli.config import load_config
    from ..openmmlab.cli.test import prepare_evaluation

    cfg = load_config(entry.config_path, work_dir=work_dir or Path("output", "zoo", name))
    dataset = cfg.test_dataloader.dataset
    dataset.data_root = f"{data}/"
    prepare_evaluation(cfg, str(checkpoint), tta)
    if entry.task == "detection":
        ann_file = _limit_annotations(data / dataset.ann_file, limit, Path(cfg.work_dir))
        dataset.ann_file = cfg.test_evaluator.ann_file = str(ann_file.absolute())
    elif limit:
        files = os.listdir(data / dataset.data_prefix.img_path)
        images = sum(file.endswith(dataset.get("img_suffix", ".jpg")) for file in files)
        dataset.indices = spread(images, limit)
    chosen = pick_device(device)
    if chosen.index is not None:
        torch.accelerator.set_device_index(chosen.index)
    runner = build_runner(cfg)
    runner.model.to(chosen)  # mmengine has no setting for the device
    figures = to_figures(runner.test())
    if tta:
        figures = {"miou_several_scales": figures["miou"]}
    return figures, len(runner.test_dataloader.dataset)


def _limit_annotations(path: Path, limit: int | None, folder: Path) -> Path:
    """Write the annotations of `limit` images to a file, as the metric counts all images in it."""
    if not limit or not path.is_file():
        return path
    truth = json.loads(path.read_text())
    truth["images"] = [truth["images"][i] for i in spread(len(truth["images"]), limit)]
    kept = {image["id"] for image in truth["images"]}
    truth["annotations"] = [a for a in truth["annotations"] if a["image_id"] in kept]
    folder.mkdir(parents=True, exist_ok=True)
    limited = folder / f"limit_{limit}_{path.name}"
    limited.write_text(json.dumps(truth))
    return limited


def compare(
    entry: Entry, measured: dict[Figure, float], whole: bool
) -> dict[Figure, dict[str, Any]]:
    """Compare measured with published results.

    Args:
        entry: Entry of the zoo.
        measured: Measured metrics, in percent.
        whole: Whether they were measured on the whole dataset.

    Returns:
        For each metric `measured` and, if it was published, `published`, `difference` and
        `reproduced`. The latter is None unless `whole`.
    """
    figures = {}
    for figure, value in measured.items():
        row: dict[str, Any] = {"measured": round(value, 2)}
        if figure in entry.published:
            difference = round(value - entry.published[figure], 2)
            row |= {"published": entry.published[figure], "difference": difference}
            row["reproduced"] = abs(difference) <= TOLERANCE if whole else None
        figures[figure] = row
    return figures
