"""Evaluate a model on a data set, or measure its throughput."""

import contextlib
import logging
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data.loader import PrefetchLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from .data import SKIPPED, share_unreadable, start
from .processes import fail_together, on_first, raise_once, rank

_logger = logging.getLogger(__name__)

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Result:
    """Results of an evaluation.

    Attributes:
        top1: Top-1 accuracy in percent of `images`.
        top5: Top-5 accuracy in percent of `images`.
        loss: Mean cross-entropy.
        images: Number of images that were read.
        corrupt: Number of images that could not be read.
        nonfinite: Number of `images` with a logit that is not finite, which count as wrong.
        images_per_second: Throughput including data loading.
    """

    top1: float
    top5: float
    loss: float
    images: int
    corrupt: int
    nonfinite: int
    images_per_second: float


def resolve_amp(amp: str, device: torch.device) -> str:
    """Return the mixed-precision mode to use: 'fp16', 'bf16' or 'off'.

    'auto' selects the published fp16 on CUDA and bf16 on CPUs with bfloat16 instructions. It is
    'off' elsewhere, as other CPUs are many times slower in 16 bits than in float32.
    """
    if amp != "auto":
        return amp
    if device.type == "cpu" and has_bf16_instructions():
        return "bf16"
    return "fp16" if device.type == "cuda" else "off"


def has_bf16_instructions() -> bool:
    """Return whether the CPU has bfloat16 instructions (AVX-512 BF16 or AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(device: torch.device, amp: str) -> contextlib.AbstractContextManager:
    """Return the autocast context of a mixed-precision mode, a key of `AMP_DTYPES`."""
    dtype = AMP_DTYPES[amp]
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader | PrefetchLoader,
    device: torch.device,
    amp: str = "off",
) -> Result:
    """Evaluate a model on a data set, together with all other processes.

    Args:
        model: Classifier on `device`; its training mode is preserved.
        loader: Loader of this process's share of the images, from :func:`~.data.val_loader`.
        device: Device of this process.
        amp: Mixed-precision mode, a key of `AMP_DTYPES`.

    Returns:
        Results over the images of all processes.

    Raises:
        ValueError: If no image can be read, or a label is not a class of the model.
        TooManyCorruptImages: If more images than `data.max_corrupt` cannot be read.
    """
    was_training = model.training
    model.eval()
    began = time.perf_counter()
    with fail_together(device):
        totals = _totals(model, loader, device, amp)
    seconds = time.perf_counter() - began  # of the slowest process
    model.train(was_training)
    share_unreadable(loader)
    if dist.is_initialized():
        totals = totals.to(device)
        dist.all_reduce(totals)
    loss, top1, top5, images, corrupt, nonfinite = totals.tolist()
    if not images:
        raise_once(ValueError("no readable image to evaluate on"))
    if nonfinite:
        _logger.log(
            on_first(logging.WARNING),
            "the logits of %d of %d images are not finite; they count as wrong", nonfinite, images,
        )  # fmt: skip
    return Result(
        top1=100 * top1 / images,
        top5=100 * top5 / images,
        loss=loss / images,
        images=int(images),
        corrupt=int(corrupt),
        nonfinite=int(nonfinite),
        images_per_second=(images + corrupt) / seconds,
    )


def _totals(
    model: nn.Module, loader: DataLoader | PrefetchLoader, device: torch.device, amp: str
) -> Tensor:
    """Sum the results over the images of this process.

    Returns:
        float64 tensor (6,) of the loss and the numbers of top-1 hits, top-5 hits, images,
        unreadable images and images without finite logits.
    """
    totals = torch.zeros(6, dtype=torch.float64)
    bar = tqdm(
        start(loader),
        desc="validate",
        total=len(loader) or None,
        leave=False,
        disable=None if rank() == 0 else True,
    )
    for images, targets in bar:
        images, targets = images.to(device), targets.to(device)
        readable = targets != SKIPPED
        with autocast(device, amp):
            logits = model(images)[readable].float()
        targets = targets[readable]
        wrong = (targets < 0) | (targets >= logits.shape[1])
        if wrong.any():
            raise ValueError(
                f"labels must be from 0 to {logits.shape[1] - 1}, the classes of the model, "
                f"got {int(targets[wrong][0])}"
            )
        finite = torch.isfinite(logits).all(1)
        ranked = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        ranked &= finite[:, None]
        loss = F.cross_entropy(logits, targets, reduction="sum")
        sums = [loss, ranked[:, 0].sum(), ranked.sum(), readable.sum()]
        sums += [(~readable).sum(), (~finite).sum()]
        totals += torch.stack(sums).to("cpu", torch.float64)
    return totals


@torch.inference_mode()
def throughput(
    model: nn.Module, image_size: int, batch_size: int, device: torch.device, amp: str
) -> float:
    """Measure the throughput on random images, the median of repeated runs after a warm-up.

    Args:
        model: Classifier on `device`.
        image_size: Height and width in pixels.
        batch_size: Images per run.
        device: Device to measure.
        amp: Mixed-precision mode, a key of `AMP_DTYPES`.

    Returns:
        Images per second.
    """
    model.eval()
    images = torch.randn(batch_size, 3, image_size, image_size, device=device)

    def run() -> float:
        began = time.perf_counter()
        with autocast(device, amp):
            model(images)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - began

    for _ in range(3):
        run()
    times = []
    while len(times) < 5 or sum(times) < 5:
        times.append(run())
    return batch_size / sorted(times)[len(times) // 2]
