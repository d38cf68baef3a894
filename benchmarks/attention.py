"""Shapes, inputs and implementations for the benchmark of multi-scale deformable attention.

With 16-bit values, locations and weights are float32, as under autocast: rounding locations to
16 bits would shift them by fractions of a pixel.
"""

import importlib
import re
from types import ModuleType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from benchmarks.competitors import TOLERANCES, Competitor, away_from_integers, by_image
from ops_dcnv4 import flash_deform_attn, ms_deform_attn, reference

OURS = "ms_deform_attn"
SPREAD = 3  # standard deviation of the points around their query, in pixels of each level
IMAGES_PER_STEP = 64  # mmcv's default
# mmcv's CUDA operator computes in float16 if value is float16. Coordinates of a hundred pixels are
# then off by up to an eighth of a pixel, which alone changes results by up to 8 % of the largest.
# This is limited precision, not an error.
MMCV_TOLERANCES = TOLERANCES | {"float16": 0.15}


class Shape(NamedTuple):
    """Size of a call of multi-scale deformable attention."""

    n: int
    name: str
    levels: tuple[tuple[int, int], ...] = ((100, 134), (50, 67), (25, 34), (13, 17))
    decoder_queries: int | None = None  # None for an encoder, where all pixels are queries
    heads: int = 8
    head_channels: int = 32
    points: int = 4

    form = "dino-encoder or dino-decoder with a batch size in front or not, such as 2xdino-encoder"
    ours = OURS

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """Parse a shape; return None if `text` has another form."""
        found = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z-]+)", text)
        if not found or found[2] not in SHAPES:
            return None
        return SHAPES[found[2]]._replace(n=int(found[1] or 1))

    def __str__(self) -> str:
        return f"{self.n}x{self.name}"

    @property
    def competitors(self) -> dict[str, Competitor]:
        """Return the implementations to compare, by name."""
        return COMPETITORS

    @property
    def pixels(self) -> int:
        """Return the number of pixels of all levels of an image."""
        return sum(height * width for height, width in self.levels)

    @property
    def queries(self) -> int:
        """Return the number of queries per image."""
        return self.decoder_queries or self.pixels

    @property
    def all_points(self) -> int:
        """Return the number of sampling points of all images."""
        return self.n * self.queries * self.heads * len(self.levels) * self.points

    def bytes_touched(self, dtype: torch.dtype) -> dict[str, int]:
        """Return the bytes per pass if each tensor and gradient is accessed once."""
        row = self.n * self.heads * self.head_channels * dtype.itemsize
        value, output = row * self.pixels, row * self.queries
        points = 3 * self.all_points * reference.compute_dtype(dtype).itemsize  # x, y and weight
        touched = {"forward": value + points + output, "backward": 2 * (value + points) + output}
        return touched | {"forward+backward": sum(touched.values())}

    def bytes_gathered(self, dtype: torch.dtype) -> int:
        """Return the bytes that the forward pass gathers from value: four pixels per point."""
        return self.all_points * 4 * self.head_channels * dtype.itemsize

    def reference_points(self, device: torch.device) -> Tensor:
        """Return reference points (N, Lq, 2): all pixel centres in an encoder, else random."""
        if self.decoder_queries:
            return torch.rand(self.n, self.decoder_queries, 2, device=device)
        centres = []
        for level in self.levels:
            y, x = ((torch.arange(size, device=device) + 0.5) / size for size in level)
            centres.append(torch.cartesian_prod(y, x).flip(1))
        return torch.cat(centres).expand(self.n, -1, -1)

    def random_inputs(self, dtype: torch.dtype, device: torch.device) -> "Inputs":
        """Return random inputs that require gradients."""
        value_options = {"dtype": dtype, "device": device}
        point_options = {"dtype": reference.compute_dtype(dtype), "device": device}
        spatial_shapes = torch.tensor(self.levels, device=device)
        pixels = spatial_shapes.prod(1)
        sizes = spatial_shapes.flip(1)[:, None]  # (L, 1, 2): W, H
        points = self.n, self.queries, self.heads, len(self.levels), self.points

        centres = self.reference_points(device)[:, :, None, None, None].to(**point_options)
        offsets = SPREAD * torch.randn(*points, 2, **point_options)
        locations = (away_from_integers(centres * sizes - 0.5 + offsets) + 0.5) / sizes
        logits = torch.randn(*points, **point_options).flatten(3)
        leaves = (
            torch.randn(self.n, self.pixels, self.heads, self.head_channels, **value_options),
            locations,
            logits.softmax(-1).unflatten(-1, points[3:]),
            torch.cat((locations.flatten(3), logits), dim=-1),
        )
        grad_output = torch.randn(
            self.n, self.queries, self.heads * self.head_channels, **value_options
        )
        return Inputs(
            *(leaf.requires_grad_() for leaf in leaves),
            spatial_shapes,
            pixels.cumsum(0) - pixels,
            grad_output,
            self,
        )

    def expected_results(self, inputs: "Inputs") -> dict[str, Tensor]:
        """Return output and gradients of the reference."""
        levels = inputs.spatial_shapes, inputs.level_start_index

        def of_image(
            grad_output: Tensor, value: Tensor, locations: Tensor, weights: Tensor, packed: Tensor
        ) -> dict[str, Tensor]:
            image = value, *levels, locations, weights
            grads = reference.ms_deform_attn_backward(grad_output, *image)
            _, grad_packed = reference.flash_deform_attn_backward(
                grad_output, value, *levels, packed, self.points
            )
            return {
                "output": reference.ms_deform_attn(*image),
                **dict(zip(SEPARATE, grads, strict=True)),
                "packed": grad_packed,
            }

        leaves = inputs.value, inputs.locations, inputs.weights, inputs.packed
        return by_image(of_image, inputs.grad_output, *(leaf.detach() for leaf in leaves))


SHAPES = {
    "dino-encoder": Shape(1, "dino-encoder"),
    "dino-decoder": Shape(1, "dino-decoder", decoder_queries=900),
}


class Inputs(NamedTuple):
    """Inputs of all implementations."""

    value: Tensor  # (N, S, M, D)
    locations: Tensor  # (N, Lq, M, L, K, 2)
    weights: Tensor  # (N, Lq, M, L, K)
    packed: Tensor  # (N, Lq, M, 3 * L * K), locations and logits of the weights
    spatial_shapes: Tensor  # (L, 2)
    level_start_index: Tensor  # (L,)
    grad_output: Tensor  # (N, Lq, M * D)
    shape: Shape


SEPARATE = ("value", "locations", "weights")
FUSED = ("value", "packed")


def run_ms_deform_attn(inputs: Inputs) -> Tensor:
    """Run :func:`ops_dcnv4.ms_deform_attn`."""
    return ms_deform_attn(
        inputs.value,
        inputs.spatial_shapes,
        inputs.level_start_index,
        inputs.locations,
        inputs.weights,
    )


def run_flash_deform_attn(inputs: Inputs) -> Tensor:
    """Run :func:`ops_dcnv4.flash_deform_attn`."""
    levels = inputs.spatial_shapes, inputs.level_start_index
    return flash_deform_attn(inputs.value, *levels, inputs.packed, inputs.shape.points)


class Reference(torch.autograd.Function):
    """The reference with its explicit backward pass."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        """Compute the output."""
        ctx.save_for_backward(*inputs)
        return reference.ms_deform_attn(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients."""
        grads = reference.ms_deform_attn_backward(grad_output, *ctx.saved_tensors)
        return grads[0], None, None, *grads[1:]


def run_reference(inputs: Inputs) -> Tensor:
    """Run the reference."""
    levels = inputs.spatial_shapes, inputs.level_start_index
    return Reference.apply(inputs.value, *levels, inputs.locations, inputs.weights)


def mmcv_module(name: str) -> ModuleType | None:
    """Return a module of mmcv, or None if it cannot be imported."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError):
        return None


def mmcv_attention() -> ModuleType | None:
    """Return mmcv's module of multi-scale deformable attention, or None without mmcv."""
    return mmcv_module("mmcv.ops.multi_scale_deform_attn")


def run_mmcv_pytorch(inputs: Inputs) -> Tensor:
    """Run mmcv's PyTorch implementation in the dtype of the locations, as under autocast."""
    value = inputs.value.to(inputs.locations.dtype)
    output = mmcv_attention().multi_scale_deformable_attn_pytorch(
        value, inputs.spatial_shapes, inputs.locations, inputs.weights
    )
    return output.to(inputs.value.dtype)


def run_mmcv_cuda(inputs: Inputs) -> Tensor:
    """Run mmcv's CUDA operator, which casts locations and weights to the dtype of value."""
    levels = inputs.spatial_shapes, inputs.level_start_index
    return mmcv_attention().MultiScaleDeformableAttnFunction.apply(
        inputs.value, *levels, inputs.locations, inputs.weights, IMAGES_PER_STEP
    )


def why_not_mmcv(inputs: Inputs) -> str | None:
    """Return why mmcv's PyTorch implementation is not available, or None if it is."""
    return None if mmcv_attention() else "not installed"


def why_not_mmcv_cuda(inputs: Inputs) -> str | None:
    """Return why mmcv's CUDA operator cannot run on the inputs, or None if it can."""
    if not mmcv_attention():
        return "not installed"
    if inputs.value.device.type != "cuda":
        return "CUDA only"
    if inputs.value.dtype == torch.bfloat16:
        return "not for bfloat16"
    compiled = mmcv_module("mmcv.ops").get_compiling_cuda_version() != "not available"
    return None if compiled else "built without CUDA"


COMPETITORS = {
    OURS: Competitor(run_ms_deform_attn, SEPARATE),
    "flash_deform_attn": Competitor(run_flash_deform_attn, FUSED),
    "reference": Competitor(run_reference, SEPARATE),
    "mmcv PyTorch": Competitor(run_mmcv_pytorch, SEPARATE, why_not_mmcv),
    "mmcv CUDA": Competitor(run_mmcv_cuda, SEPARATE, why_not_mmcv_cuda, tolerances=MMCV_TOLERANCES),
}
