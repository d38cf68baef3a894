"""Measure models of transformers before and after `ops_dcnv4.integrations.patch`.

    python -m benchmarks.integrations
    python -m benchmarks.integrations --models deformable_detr d_fine --size 640 --passes forward

The models have their default sizes and random weights. The original and the patched model take
turns, and their outputs are compared first. Requires transformers.
"""

import argparse
import copy
import functools
from collections.abc import Callable, Iterable

import torch
import transformers
from torch import Tensor, nn

from benchmarks import charts, record, timing
from benchmarks.record import write
from ops_dcnv4.integrations import patch

Inputs = dict[str, Tensor]
TOLERANCE = 1e-3  # relative to the largest output; top-k selection amplifies rounding errors
LEGEND = f"""
Median time per call (~ marks an interquartile range above {timing.UNSTEADY:.0%}) of the model
before and after patching, and their ratio. Forward: without gradients. Random images of
{{size}} x {{size}} pixels, float32."""


def deformable_detr() -> nn.Module:
    """Build Deformable DETR with ResNet-50."""
    resnet = transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    config = transformers.DeformableDetrConfig(backbone_config=resnet, use_timm_backbone=False)
    return transformers.DeformableDetrForObjectDetection(config)


def oneformer() -> nn.Module:
    """Build OneFormer with Swin-T, for inference."""
    config = transformers.OneFormerConfig(is_training=False)
    return transformers.OneFormerForUniversalSegmentation(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "deformable_detr": deformable_detr,
    "rt_detr": lambda: transformers.RTDetrForObjectDetection(transformers.RTDetrConfig()),
    "rt_detr_v2": lambda: transformers.RTDetrV2ForObjectDetection(transformers.RTDetrV2Config()),
    "d_fine": lambda: transformers.DFineForObjectDetection(transformers.DFineConfig()),
    "grounding_dino": lambda: transformers.GroundingDinoForObjectDetection(
        transformers.GroundingDinoConfig()
    ),
    "mask2former": lambda: transformers.Mask2FormerForUniversalSegmentation(
        transformers.Mask2FormerConfig()
    ),
    "oneformer": oneformer,
}


def random_inputs(name: str, size: int, device: torch.device) -> Inputs:
    """Return the inputs of a model for one image."""
    inputs = {"pixel_values": torch.rand(1, 3, size, size, device=device)}
    if name == "grounding_dino":
        inputs["input_ids"] = torch.tensor([[101, 4937, 1012, 3899, 1012, 102]], device=device)
    if name == "oneformer":
        inputs["task_inputs"] = torch.randint(0, 49408, (1, 77), device=device)
    return inputs


def run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Return the floating-point outputs of a model; infinite logits become zero."""
    outputs = model(**inputs).values()
    return [
        tensor.nan_to_num(neginf=0)
        for tensor in outputs
        if isinstance(tensor, Tensor) and tensor.is_floating_point()
    ]


def forward(model: nn.Module, inputs: Inputs) -> Callable[[], list[Tensor]]:
    """Return a call of the forward pass without gradients."""
    return torch.no_grad()(functools.partial(run, model, inputs))


def forward_backward(model: nn.Module, inputs: Inputs) -> Callable[[], None]:
    """Return a call of both passes."""

    def call() -> None:
        model.zero_grad()
        losses = [o.square().mean() for o in run(model, inputs) if o.requires_grad]
        torch.stack(losses).sum().backward()

    return call


PASSES: dict[str, Callable] = {charts.PASSES[0]: forward, charts.PASSES[2]: forward_backward}


def largest_difference(models: Iterable[nn.Module], inputs: Inputs) -> float:
    """Return the largest difference between the outputs, relative to the largest output."""
    expected, actual = (forward(model, inputs)() for model in models)
    differences = (
        ((a - e).abs().max() / e.abs().max().clamp(min=1)).item()
        for a, e in zip(actual, expected, strict=True)
    )
    return max(differences)


def cell(result: dict) -> str:
    """Format a time for the table."""
    if "seconds" not in result:
        return f"({result['note']})"
    return f"{'~' * timing.is_unsteady(result)}{1e3 * result['seconds']:.1f} ms"


def benchmark(name: str, args: argparse.Namespace) -> list[dict]:
    """Time a model before and after patching, and write a row of the table for each pass."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    original = MODELS[name]().eval().to(device)
    patched = copy.deepcopy(original)
    layers = len(patch(patched).patched)
    inputs = random_inputs(name, args.size, device)
    difference = largest_difference((original, patched), inputs)
    if not difference <= TOLERANCE:
        raise SystemExit(f"error: {name}: patching changes the outputs by {difference:.1e}")
    results = []
    for pass_name in args.passes:
        prepares = {
            when: functools.partial(PASSES[pass_name], model)
            for when, model in (("before", original), ("after", patched))
        }
        times = timing.measure_interleaved(prepares, [inputs], args.min_time)
        result = {"model": name, "pass": pass_name, "layers": layers, "difference": difference}
        result |= times
        if all("seconds" in times[when] for when in prepares):
            result["ratio"] = times["before"]["seconds"] / times["after"]["seconds"]
        ratio = f"{result['ratio']:.2f}x" if "ratio" in result else ""
        write(
            f"{name:17}{pass_name:20}{layers:3} layers{cell(times['before']):>15}"
            f"{cell(times['after']):>15}{ratio:>8}"
        )
        results.append(result)
    return results


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.integrations", description=__doc__.splitlines()[0]
    )
    option = parser.add_argument
    option("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    option("--passes", nargs="+", choices=PASSES, default=list(PASSES), metavar="PASS")
    help_size = "height and width of the image, default: %(default)s"
    option("--size", type=record.positive(int), default=480, metavar="N", help=help_size)
    record.add_common_options(parser, min_time=3)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    settings = {"size": args.size, "min_time": args.min_time, "passes": list(args.passes)}
    run = record.start("integrations", torch.device(args.device), settings)
    write(LEGEND.format(size=args.size))
    for name in args.models:
        run["results"] += benchmark(name, args)
        file = record.save(run, args.output)
    write(f"\nresults: {file}")


if __name__ == "__main__":
    main()
