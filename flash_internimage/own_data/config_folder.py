"""Write configs for datasets of class folders."""

import difflib
from pathlib import Path

import timm
import yaml

from ..checkpoints.zoo import Entry, read_zoo
from .layouts import TRAIN, VAL, find_class_folders
from .schedules import classification_epochs


def folder_config(root: Path, model: str, name: str) -> str:
    """Return a config that trains a classifier on folders of images.

    Args:
        root: Folder that contains a folder for each split, with a folder for each class.
        model: Name of a released checkpoint, or architecture of timm without weights.
        name: Name of the config, after which its output folder is called.

    Raises:
        FileNotFoundError: If the folders of the splits are not found.
        ValueError: If there is no such model, or the training split has no images or fewer than
            two classes.
    """
    from ..classification.data.folders import list_folder
    from ..classification.output import suitable_ema_decay

    entry = _find_entry(model)
    train, val = (find_class_folders(root, names) for names in (TRAIN, VAL))
    images = list_folder(root / train).images
    classes = {Path(image).parent.name for image in images} - {""}
    if len(classes) < 2:
        raise ValueError(
            f"{root / train} must contain at least 2 folders of images, one for each class, got "
            f"{len(classes)} with images"
        )
    batch_size = min(64, len(images) // 2 * 2)
    epochs = classification_epochs(len(images), batch_size)
    settings: dict[str, str | int] = {"name": model.partition(".")[0], "num_classes": len(classes)}
    if entry is not None:
        settings["initial_checkpoint"] = model
    data: dict[str, str | int] = {"root": root.as_posix()}
    data |= {"train_split": train} if train != "train" else {}
    data |= {"val_split": val} if val != "val" else {}
    if entry is not None and entry.resolution != 224:
        data["image_size"] = entry.resolution
    content = {
        "output": f"output/{name}",
        "batch_size": batch_size,
        "ema_decay": float(suitable_ema_decay(epochs * (len(images) // batch_size))),
        "model": settings,
        "data": data,
        "schedule": {"epochs": epochs, "warmup_epochs": max(1, epochs // 15)},
    }
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return f"# {len(images)} images of {len(classes)} classes\n{text}"


def _find_entry(model: str) -> Entry | None:
    """Return the entry of a released classifier; None for an architecture of timm."""
    zoo = {name: e for name, e in read_zoo().items() if e.task == "classification"}
    if model in zoo or ("." not in model and timm.is_model(model)):
        return zoo.get(model)
    close = difflib.get_close_matches(model, [*zoo, *timm.list_models()], n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ValueError(
        f"--model must be {', '.join(zoo)}, or an architecture of timm, got {model}{hint}"
    )
