"""Train small diffusion models of digits, with and without DCNv4.

    python -m tools.demo_diffusion [--steps 2000] [--samples 898]

A U-Net, one with DCNv4 in place of the convolutions of its ResNet blocks, and one with DCNv4 in
place of its attention are trained on scikit-learn's 8 x 8 digits, with equal batches and noise. The
folder --output contains

    NAME.pth      state of the training of a model, saved every hundred steps, to resume from
    losses.csv    mean training losses
    result.json   parameters, losses, and Frechet distances of the samples to half of the digits,
                  and of random halves of the digits to each other
    samples.png   digits, and samples of each model
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from flash_internimage import extras
from flash_internimage.checkpoints import load_checkpoint
from flash_internimage.checkpoints.loading import save_atomically
from flash_internimage.console import log_to_terminal
from flash_internimage.drawing import contact_sheet
from flash_internimage.files import own_folder, write_atomically, write_csv, write_text

if TYPE_CHECKING:
    from diffusers import DDPMScheduler, UNet2DModel

ROOT = Path(__file__).parents[1]
PROGRAM = "python -m tools.demo_diffusion"
CLASSIFIER = ROOT / "configs/classification/flash_internimage_nano_digits.yaml"

Layers = Literal["resnets", "attentions"]

# What replace_in_unet replaces in each model.
MODELS: dict[str, Layers | None] = {
    "unet": None,
    "dcnv4-resnets": "resnets",
    "dcnv4-attentions": "attentions",
}
BATCH_SIZE, LEARNING_RATE, WARMUP = 64, 1e-3, 100
SAVE_EVERY = 100  # steps
NOISE_LEVELS, SAMPLING_STEPS = 1000, 50
SPLITS = 10  # of the digits into halves


def make_unet(layers: Layers | None) -> "UNet2DModel":
    """Return a U-Net for 8 x 8 images with DCNv4 in place of some layers, if any."""
    from diffusers import UNet2DModel

    from flash_internimage.diffusion import replace_in_unet

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    return unet if layers is None else replace_in_unet(unet, layers)


def make_scheduler() -> "DDPMScheduler":
    """Return the noise schedule of the training and the samples."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(NOISE_LEVELS, beta_schedule="squaredcos_cap_v2")


def read_digits() -> Tensor:
    """Return the digits (1797, 1, 8, 8), from -1 to 1, in a fixed random order."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 8 - 1
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]


def train(
    unet: "UNet2DModel",
    images: Tensor,
    steps: int,
    checkpoint: Path,
    report: Callable[[int, float], None],
) -> list[float]:
    """Train a model to predict noise, or continue from its checkpoint.

    Step number i draws its batch and noise with the seed i, in any model.

    Args:
        unet: Model, changed in place.
        images: Images (N, 1, H, W) from -1 to 1.
        steps: Number of optimizer steps.
        checkpoint: File to resume from if it exists, written every hundred steps.
        report: Function that receives the number of completed steps and the mean loss of the last
            hundred, or fewer at the end.

    Returns:
        The loss of each step.

    Raises:
        ValueError: If the checkpoint is of another number of steps or another model.
    """
    scheduler = make_scheduler()
    optimizer = torch.optim.AdamW(unet.parameters(), LEARNING_RATE)
    losses: list[float] = []
    if checkpoint.exists():
        state = load_checkpoint(checkpoint)
        if state.get("steps") != steps:
            raise ValueError(
                f"--steps must be {state.get('steps')} to resume from {checkpoint}, got {steps}; "
                "delete it or choose another --output"
            )
        unet.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses = state["losses"]
    unet.train()
    for step in range(len(losses), steps):
        generator = torch.Generator().manual_seed(step)
        batch = images[torch.randint(len(images), (BATCH_SIZE,), generator=generator)]
        noise = torch.randn(batch.shape, generator=generator)
        levels = torch.randint(NOISE_LEVELS, (BATCH_SIZE,), generator=generator)
        predicted = unet(scheduler.add_noise(batch, noise, levels), levels).sample
        loss = F.mse_loss(predicted, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, steps)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            state = {
                "steps": steps,
                "model": unet.state_dict(),
                "optimizer": optimizer.state_dict(),
                "losses": losses,
            }
            save_atomically(state, checkpoint)
            report(step + 1, _means(losses)[-1])
    return losses


def _learning_rate(step: int, steps: int) -> float:
    """Return a rate that rises over the first steps and falls to zero along a cosine."""
    return LEARNING_RATE * min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / steps)) / 2


def _means(losses: list[float]) -> list[float]:
    """Return the mean of each hundred losses, and of the rest."""
    parts = [losses[i : i + SAVE_EVERY] for i in range(0, len(losses), SAVE_EVERY)]
    return [sum(part) / len(part) for part in parts]


@torch.inference_mode()
def sample(unet: "UNet2DModel", count: int) -> Tensor:
    """Return samples (count, 1, 8, 8) from -1 to 1, from the same noise for every model."""
    scheduler = make_scheduler()
    scheduler.set_timesteps(SAMPLING_STEPS)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 1, 8, 8, generator=generator)
    unet.eval()
    for level in scheduler.timesteps:
        predicted = torch.cat([unet(part, level).sample for part in images.split(256)])
        images = scheduler.step(predicted, level, images, generator=generator).prev_sample
    return images.clamp(-1, 1)


def load_features(checkpoint: Path) -> Callable[[Tensor], Tensor]:
    """Return a function from images (N, 1, 8, 8) to features (N, C) of the demo's classifier.

    The features are the input of its last layer.

    Args:
        checkpoint: Checkpoint of the classification demo.
    """
    from torchvision.transforms import Compose

    from flash_internimage.inference import load_predictor

    predictor = load_predictor(CLASSIFIER, checkpoint, device="cpu")
    transform = Compose(predictor.steps)
    model: Any = predictor.model

    @torch.inference_mode()
    def features(images: Tensor) -> Tensor:
        # As in the dataset that the classifier was trained on.
        pictures = [_to_rgb(image).resize((32, 32), Image.Resampling.BICUBIC) for image in images]
        inputs = torch.stack([transform(picture) for picture in pictures])
        return torch.cat(
            [
                model.forward_head(model.forward_features(part), pre_logits=True)
                for part in inputs.split(64)
            ]
        )

    return features


def _to_rgb(image: Tensor) -> Image.Image:
    pixels = ((image[0] + 1) * 127.5).round().byte().numpy()
    return Image.fromarray(pixels).convert("RGB")


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the Frechet distance between normal distributions fitted to two sets of features.

    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), as FID defines it.

    Args:
        a: Features (N, C), with N > 1.
        b: Features (M, C), with M > 1.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # The eigenvalues of the product are real and not negative, up to rounding errors.
    roots = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace()
    return (distance - 2 * roots.sum()).item()


def _grid(images: Tensor) -> np.ndarray:
    """Return the first 64 of the images in 8 rows, as an RGB picture."""
    rows = F.pad(images[:64], (0, 1, 0, 1), value=1.0).unflatten(0, (8, -1))
    picture = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)[..., 0]
    return np.asarray(_to_rgb(picture[None]).resize((288, 288), Image.Resampling.NEAREST))


def run(steps: int, count: int, classifier: Path, output: Path) -> None:
    """Train the models, compare and draw their samples, and print the results."""
    unets = {name: make_unet(layers) for name, layers in MODELS.items()}
    digits = read_digits()
    features = load_features(classifier)
    half = len(digits) // 2
    of_digits = features(digits)
    grids, captions = [_grid(digits)], ["digits"]
    results: dict[str, dict[str, float]] = {}
    losses: dict[str, list[float]] = {}
    for name, unet in unets.items():

        def report(step: int, loss: float, name: str = name) -> None:
            sys.stdout.write(f"{name}  step {step}/{steps}  loss {loss:.4f}\n")
            sys.stdout.flush()

        losses[name] = _means(train(unet, digits, steps, output / f"{name}.pth", report))
        samples = sample(unet, count)
        results[name] = {
            "parameters": sum(parameter.numel() for parameter in unet.parameters()),
            "loss": losses[name][-1],
            "distance": frechet_distance(features(samples), of_digits[:half]),
        }
        grids.append(_grid(samples))
        captions.append(name)
    ends = [min(i, steps) for i in range(SAVE_EVERY, steps + SAVE_EVERY, SAVE_EVERY)]
    rows = zip(ends, *losses.values(), strict=True)
    write_csv(output / "losses.csv", [("step", *losses), *rows])
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(digits), generator=generator) for _ in range(SPLITS)]
    halves = [frechet_distance(of_digits[i[:half]], of_digits[i[half:]]) for i in orders]
    figures = {"steps": steps, "samples": count, "models": results, "digits": halves}
    write_text(output / "result.json", json.dumps(figures, indent=2) + "\n")
    picture = Image.fromarray(contact_sheet(grids, captions, columns=4, cell_width=288))
    write_atomically(output / "samples.png", lambda file: picture.save(file, "PNG", optimize=True))
    sys.stdout.write(_table(figures, losses, ends))
    sys.stdout.write(f"{output / 'samples.png'}\n")


def _table(figures: dict, losses: dict[str, list[float]], ends: list[int]) -> str:
    """Return the losses and distances side by side."""
    shown = sorted({len(ends) * (i + 1) // 6 - 1 for i in range(6)} - {-1})
    models = figures["models"]
    rows = [["", *models]]
    rows += [[f"loss, step {ends[i]}", *(f"{losses[m][i]:.4f}" for m in models)] for i in shown]
    rows.append(["parameters", *(f"{m['parameters']:,}" for m in models.values())])
    rows.append(["Frechet distance", *(f"{m['distance']:.3f}" for m in models.values())])
    lines = ["  ".join(f"{cell:<18}" for cell in row).rstrip() for row in rows]
    low, high = min(figures["digits"]), max(figures["digits"])
    note = f"Frechet distance between random halves of the digits: {low:.3f} to {high:.3f}"
    return "\n".join([*lines, note, ""])


def _count(text: str) -> int:
    if not text.isdecimal() or not 64 <= int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"must be an integer from 64 to 1000000, got {text}")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Run the demo and return the exit code."""
    parser = argparse.ArgumentParser(PROGRAM, description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=_count, default=2000, help="optimizer steps of each model")
    parser.add_argument("--samples", type=_count, default=898, help="samples of each model")
    parser.add_argument("--classifier", type=Path, default=ROOT / "output/digits/best.pth",
                        help="checkpoint of `make demo`, for the features")  # fmt: skip
    parser.add_argument("--output", type=Path, default=ROOT / "output/digits-diffusion")
    arguments = parser.parse_args(argv)
    log_to_terminal()
    try:
        if not arguments.classifier.is_file():
            raise ValueError(f"--classifier {arguments.classifier} does not exist: run `make demo`")
        with extras.required_by(PROGRAM), own_folder(arguments.output):
            run(arguments.steps, arguments.samples, arguments.classifier, arguments.output)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{PROGRAM}: error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"{PROGRAM}: interrupted; the same command resumes\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
