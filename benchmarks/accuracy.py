"""Train small classifiers on Fashion-MNIST with several seeds, and compare their accuracy.

    python -m benchmarks.accuracy --data FOLDER
    python -m benchmarks.accuracy --data FOLDER --models convnext convnext_softmax --seeds 0

FOLDER contains the four files of Fashion-MNIST, such as train-images-idx3-ubyte.gz. All networks
have about as many multiply-adds and are trained with the same recipe; runs with the same seed see
the same batches. Some have a softmax over the taps of a convolution or of DCNv4, which the paper
(arXiv:2401.06197) found harmful. Finished runs are kept: an interrupted benchmark continues.
"""

import argparse
import functools
import gzip
import itertools
import json
import statistics
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import charts, record
from benchmarks.record import positive, write
from flash_internimage.backbones import InternImage
from flash_internimage.backbones.flash_internimage import ARCHITECTURES
from flash_internimage.dropin import replace
from ops_dcnv4 import DCNv4
from ops_dcnv4.modules.common import softmax_over_taps

SIDE, PADDED, ENLARGED = 28, 32, 64  # pixels: of the files, with padding, of the networks
MEAN, STD = 0.286, 0.353  # of the training images
SPLITS = {"train": "train", "test": "t10k"}
RECIPE: dict[str, float] = {
    "lr": 1e-3,
    "weight_decay": 0.05,
    "label_smoothing": 0.1,
    "drop_path_rate": 0.05,
}
TEST_BATCH = 250
KINDS: dict[str, Any] = {
    "num_classes": 10,
    "in_chans": 1,
    "drop_path_rate": RECIPE["drop_path_rate"],
}
NANO: dict[str, Any] = dict(ARCHITECTURES["nano"])


class SoftmaxWeights(nn.Module):
    """Softmax over the taps of the weights of a convolution, (C_out, C_in, H, W)."""

    def forward(self, weights: Tensor) -> Tensor:
        """Return weights that are positive and sum to one in each channel."""
        return weights.flatten(2).softmax(2).view_as(weights)


class SoftmaxModulation(nn.Module):
    """Softmax over the modulation in the packed offsets and modulation of DCNv4.

    Args:
        groups: Number of groups.
        taps: Number of taps of the window.
    """

    def __init__(self, groups: int, taps: int) -> None:
        super().__init__()
        self.groups, self.taps = groups, taps

    def forward(self, offset_mask: Tensor) -> Tensor:
        """Normalize the modulation in a tensor (N, H, W, P), P >= 3 * groups * taps."""
        used = 3 * self.groups * self.taps
        groups = offset_mask[..., :used].unflatten(3, (self.groups, -1))
        offsets, scores = groups.split([2 * self.taps, self.taps], dim=4)
        weights = softmax_over_taps(scores.flatten(3), self.groups).view_as(scores)
        packed = torch.cat((offsets, weights), dim=4).flatten(3)
        return F.pad(packed, (0, offset_mask.shape[3] - used))


def convnext() -> nn.Module:
    """Create ConvNeXt-atto with half its blocks.

    Its layer scale starts at 1 instead of 1e-6, from which it could not recover in a short run.
    """
    return timm.create_model("convnext_atto", depths=(1, 1, 3, 1), ls_init_value=1.0, **KINDS)


def convnext_softmax() -> nn.Module:
    """Create the ConvNeXt with a softmax over the 7 x 7 weights of each channel."""
    model = convnext()
    for block in model.modules():
        if isinstance(block, ConvNeXtBlock):
            register_parametrization(block.conv_dw, "weight", SoftmaxWeights())
    return model


def convnext_dcnv4() -> nn.Module:
    """Create the ConvNeXt with DCNv4 in place of its depth-wise convolutions."""
    return replace(convnext())


def convnext_dcnv4_softmax() -> nn.Module:
    """Create the ConvNeXt with DCNv4, and a softmax over its modulation as in DCNv3."""
    model = convnext_dcnv4()
    for layer in [module for module in model.modules() if isinstance(module, DCNv4)]:
        softmax = SoftmaxModulation(layer.group, layer.taps)
        layer.offset_mask = nn.Sequential(layer.offset_mask, softmax)  # type: ignore[assignment]
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "flash_internimage": functools.partial(timm.create_model, "flash_internimage_nano", **KINDS),
    "internimage": lambda: InternImage(**NANO, **KINDS),
    "convnext": convnext,
    "vit": functools.partial(
        timm.create_model,
        "vit_tiny_patch16_224",
        img_size=ENLARGED,
        patch_size=8,
        embed_dim=96,
        depth=3,
        num_heads=3,
        **KINDS,
    ),
    "convnext_softmax": convnext_softmax,
    "convnext_dcnv4": convnext_dcnv4,
    "convnext_dcnv4_softmax": convnext_dcnv4_softmax,
}


def read_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Read images (N, 1, 28, 28) in [0, 1] and labels (N,) of a split.

    Raises:
        ValueError: If a file is missing or damaged.
    """
    files = [folder / f"{SPLITS[split]}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    try:
        images, labels = (
            np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8, offset=header)
            for file, header in zip(files, (16, 8), strict=True)
        )
        pixels = images.reshape(len(labels), 1, SIDE, SIDE)
        if not len(labels) or labels.max() >= KINDS["num_classes"]:
            raise ValueError(f"labels must be from 0 to {KINDS['num_classes'] - 1}")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        names = " and ".join(file.name for file in files)
        raise ValueError(f"must contain {names} of Fashion-MNIST, got {folder}: {error}") from error
    return torch.from_numpy(pixels / np.float32(255)), torch.from_numpy(labels.astype(np.int64))


def enlarge(images: Tensor) -> Tensor:
    """Normalize padded images (N, 1, 32, 32), and enlarge them to 64 x 64."""
    images = F.interpolate((images - MEAN) / STD, size=ENLARGED, mode="bilinear")
    return images.contiguous(memory_format=torch.channels_last)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pad images (N, 1, 28, 28) to 32 x 32, shifted by up to 2 pixels, and flip half of them."""
    images = F.pad(images, [PADDED - SIDE] * 4)
    corners = torch.randint(PADDED - SIDE + 1, (len(images), 2), generator=generator).tolist()
    crops = torch.stack(
        [
            image[:, y : y + PADDED, x : x + PADDED]
            for image, (y, x) in zip(images, corners, strict=True)
        ]
    )
    flipped = torch.rand(len(crops), 1, 1, 1, generator=generator) < 0.5
    return torch.where(flipped, crops.flip(3), crops)


def train(
    model: nn.Module, data: tuple[Tensor, Tensor], seed: int, epochs: int, batch_size: int
) -> list[float]:
    """Train a model; return the mean loss of each epoch."""
    images, labels = data
    device = next(model.parameters()).device
    steps = len(images) // batch_size
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, RECIPE["lr"], weight_decay=RECIPE["weight_decay"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RECIPE["lr"], epochs * steps, pct_start=0.1, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(seed)
    losses = []
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        total = 0.0
        for batch in order[: steps * batch_size].split(batch_size):
            inputs = enlarge(augment(images[batch], generator)).to(device)
            logits = model(inputs)
            smoothing = RECIPE["label_smoothing"]
            loss = F.cross_entropy(logits, labels[batch].to(device), label_smoothing=smoothing)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += loss.item()
        losses.append(total / steps)
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Return the share of images that a model classifies correctly, in percent."""
    model.eval()
    device, correct = next(model.parameters()).device, 0
    for images, labels in zip(*(tensor.split(TEST_BATCH) for tensor in data), strict=True):
        inputs = enlarge(F.pad(images, [(PADDED - SIDE) // 2] * 4)).to(device)
        correct += int((model(inputs).argmax(1).cpu() == labels).sum())
    return 100 * correct / len(data[1])


@torch.no_grad()
def complexity(model: nn.Module) -> dict[str, int]:
    """Return the number of parameters, and the multiply-adds for an image."""
    counter = FlopCounterMode(display=False)
    with counter:
        model.eval()(torch.zeros(1, 1, ENLARGED, ENLARGED))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "multiply_adds": counter.get_total_flops() // 2}


def benchmark(
    name: str, seed: int, data: dict[str, tuple[Tensor, Tensor]], args: argparse.Namespace
) -> dict:
    """Train and evaluate a network, and write a row of the table."""
    began = time.perf_counter()
    torch.manual_seed(seed)
    model = MODELS[name]()
    result: dict[str, Any] = {"model": name, "seed": seed, **complexity(model)}
    # torch's overloads of Module.to lack memory_format.
    model = model.to(args.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    result["losses"] = train(model, data["train"], seed, args.epochs, args.batch_size)
    result["top1"] = accuracy(model, data["test"])
    result["seconds"] = time.perf_counter() - began
    losses = " ".join(f"{loss:.3f}" for loss in result["losses"])
    write(f"{name:24}seed {seed}{result['top1']:8.2f} %   loss by epoch {losses}")
    return result


def summarize(results: list[dict]) -> list[str]:
    """Return a line for each model: its size, and mean and spread of its accuracy."""
    lines = [f"{'model':24}{'parameters':>12}{'MACs':>10}{'mean':>9}{'lowest':>9}{'highest':>9}"]
    for name in dict.fromkeys(result["model"] for result in results):
        own = [result for result in results if result["model"] == name]
        top1 = [result["top1"] for result in own]
        size = f"{own[0]['parameters'] / 1e6:10.2f} M{own[0]['multiply_adds'] / 1e6:8.1f} M"
        spread = f"{statistics.mean(top1):9.2f}{min(top1):9.2f}{max(top1):9.2f}"
        lines.append(f"{name:24}{size}{spread}   {len(own)} seed{'s' * (len(own) > 1)}")
    return lines


def read_finished(run: dict, folder: Path) -> list[dict]:
    """Return the results of an earlier run with the same settings.

    Raises:
        SystemExit: If there are results with other settings, or the file cannot be read.
    """
    file = record.results_file(run, folder)
    if not file.exists():
        return []
    try:
        earlier = json.loads(file.read_text())
        settings, results = earlier["settings"], earlier["results"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SystemExit(
            f"error: {file} is not a result of this benchmark: choose another --output"
        ) from error
    if settings != run["settings"]:
        raise SystemExit(f"error: {file} has results with other settings: choose another --output")
    return results


def _seed(text: str) -> int:
    number = int(text) if text.isdecimal() else -1
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to 2^63 - 1, got {text!r}")
    return number


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=__doc__.splitlines()[0]
    )
    option = parser.add_argument
    default = "default: %(default)s"
    option("--data", type=Path, required=True, metavar="DIR", help="the files of Fashion-MNIST")
    names = f"default: {' '.join(MODELS)}"
    option("--models", nargs="+", choices=MODELS, default=[*MODELS], metavar="NAME", help=names)
    option("--seeds", nargs="+", type=_seed, default=[0, 1, 2], metavar="N", help=default)
    option("--epochs", type=positive(int), default=5, metavar="N", help=default)
    text = f"the first N training images, {default}"
    option("--train-images", type=positive(int), default=10_000, metavar="N", help=text)
    option("--batch-size", type=positive(int), default=64, metavar="N", help=default)
    record.add_machine_options(parser)
    args = parser.parse_args(argv)
    try:
        args.splits = {split: read_split(args.data, split) for split in SPLITS}
    except ValueError as error:
        parser.error(f"argument --data: {error}")
    found = len(args.splits["train"][1])
    if not args.batch_size <= args.train_images <= found:
        parser.error(
            f"argument --train-images: must be from {args.batch_size} (the batch size) to {found}, "
            f"got {args.train_images}"
        )
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    settings = {name: getattr(args, name) for name in ("epochs", "train_images", "batch_size")}
    run = record.start("accuracy", torch.device(args.device), settings | RECIPE)
    run["results"] = read_finished(run, args.output)
    done = {(result["model"], result["seed"]) for result in run["results"]}
    data = dict(args.splits)
    data["train"] = tuple(tensor[: args.train_images] for tensor in data["train"])
    write("")
    for seed, name in dict.fromkeys(itertools.product(args.seeds, args.models)):
        if (name, seed) not in done:
            run["results"].append(benchmark(name, seed, data, args))
            record.save(run, args.output)
    file = record.results_file(run, args.output)
    write("\n" + "\n".join(summarize(run["results"])))
    write(f"\nresults: {file}\nchart: {charts.draw(file)}")


if __name__ == "__main__":
    main()
