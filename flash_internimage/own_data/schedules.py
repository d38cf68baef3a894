"""Schedules for datasets that are much smaller than COCO and ADE20K."""

import math

# Fine-tuning on few images needs some thousand iterations, whatever the number of epochs is.
_MIN_ITERATIONS = 3000
_EPOCHS = (12, 100)  # COCO's 1x schedule, and the most that small datasets get
_WARMUP = 500
# ADE20K's 160,000 iterations with 16 images are 127 epochs.
_SEGMENTATION_EPOCHS = 100
_ITERATIONS = (2000, 160_000)


def detection_schedule(images: int, batch_size: int, family: str) -> str | None:
    """Return the settings of a detector's schedule, or None if that of COCO fits.

    Args:
        images: Number of training images.
        batch_size: Total batch size.
        family: Architecture, such as `mask_rcnn`.
    """
    per_epoch = math.ceil(images / batch_size)
    lowest, highest = _EPOCHS
    epochs = min(max(math.ceil(_MIN_ITERATIONS / per_epoch), lowest), highest)
    warmup = min(_WARMUP, max(1, epochs * per_epoch // 10))
    if epochs == lowest and warmup == _WARMUP:
        return None
    steps = (11,) if family == "dino" else (8, 11)  # of 12 epochs
    milestones = [round(epochs * step / 12) for step in steps]
    return (
        f"# {images} images: {epochs} epochs of {per_epoch} iterations with {batch_size} images\n"
        f"train_cfg = dict(max_epochs={epochs}, val_interval={max(1, epochs // 12)})\n"
        "param_scheduler = [\n"
        f'    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end={warmup}),\n'
        f'    dict(type="MultiStepLR", by_epoch=True, begin=0, end={epochs}, '
        f"milestones={milestones}, gamma=0.1),\n"
        "]\n"
    )


def segmentation_schedule(images: int, batch_size: int) -> str:
    """Return the settings of a segmentor's schedule.

    Args:
        images: Number of training images.
        batch_size: Total batch size.
    """
    lowest, highest = _ITERATIONS
    iterations = math.ceil(images * _SEGMENTATION_EPOCHS / batch_size / 1000) * 1000
    iterations = min(max(iterations, lowest), highest)
    interval = iterations // 10
    warmup = min(1500, iterations // 40)
    text = (
        f"# {images} images: about {round(iterations * batch_size / images)} epochs with "
        f"{batch_size} images per iteration\n"
        f"train_cfg = dict(max_iters={iterations}, val_interval={interval})\n"
        "param_scheduler = [\n"
        '    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, '
        f"end={warmup + 1}),\n"
        '    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=0, '
        f"end={iterations + 1}),\n"
        "]\n"
    )
    if interval < 1000:
        text += f"default_hooks = dict(checkpoint=dict(interval={interval}))\n"
    return text


def classification_epochs(images: int, batch_size: int) -> int:
    """Return the number of epochs of a classifier.

    Args:
        images: Number of training images.
        batch_size: Total batch size.
    """
    return min(max(math.ceil(_MIN_ITERATIONS * batch_size / images), 30), 100)
