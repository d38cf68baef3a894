"""Multi-scale deformable attention benchmark: shapes, inputs and alternative implementations.

With 16-bit values, locations and weights are float32, as under autocast: rounding locations to
16 bits would shift them by fractions of a pixel.
"""

import dataclasses
import re
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from benchmarks.competitors import (
    TOLERANCES,
    Competitor,
    away_from_integers,
    load,
    require,
    run_reference,
    run_triton,
)
from ops_dcnv4 import flash_deform_attn, ms_deform_attn, reference

SPREAD = 3  # standard deviation of the points around their query, in pixels of each level
IMAGES_PER_STEP = 64  # mmcv's default
# mmcv's CUDA operator computes in float16 if value is float16. Coordinates of a hundred pixels are
# then off by up to an eighth of a pixel, which alone changes results by up to 8 % of the largest.
# This is limited precision, not an error.
MMCV_TOLERANCES = TOLERANCES | {"float16": 0.15}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Size of a call of multi-scale deformable attention."""

    n: int
    name: str
    levels: tuple[tuple[int, int], ...] = ((100, 134), (50, 67), (25, 34), (13, 17))
    decoder_queries: int | None = None  # None for an encoder, where all pixels are queries
    heads: int = 8
    head_channels: int = 32
    points: int = 4

    form: ClassVar = "[Nx]dino-encoder or [Nx]dino-decoder, such as 2xdino-encoder"
    family: ClassVar = "attention"
    used_channels: ClassVar[dict[str, int]] = {}  # nothing is padded
    competitors: ClassVar[dict[str, Competitor]]  # the first is ours
    references: ClassVar[list[Competitor]]  # ground truth for the competitors

    @staticmethod
    def parse(text: str) -> "Shape | None":
        """Parse a shape; return None if `text` has another form."""
        found = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z-]+)", text)
        if not found or found[2] not in SHAPES:
            return None
        return dataclasses.replace(SHAPES[found[2]], n=int(found[1] or 1))

    def __str__(self) -> str:
        return f"{self.n}x{self.name}"

    @property
    def group_channels(self) -> int:
        """Return the number of channels per head."""
        return self.head_channels

    @property
    def pixels(self) -> int:
        """Return the number of pixels of all levels of an image."""
        return sum(height * width for height, width in self.levels)

    @property
    def queries(self) -> int:
        """Return the number of queries per image."""
        return self.decoder_queries or self.pixels

    @property
    def samples(self) -> int:
        """Return the number of sampling points per output channel."""
        return len(self.levels) * self.points

    def reference_points(self, device: torch.device) -> Tensor:
        """Return reference points (N, Lq, 2): all pixel centers in an encoder, else random."""
        if self.decoder_queries:
            return torch.rand(self.n, self.decoder_queries, 2, device=device)
        centers = []
        for level in self.levels:
            y, x = ((torch.arange(size, device=device) + 0.5) / size for size in level)
            centers.append(torch.cartesian_prod(y, x).flip(1))
        return torch.cat(centers).expand(self.n, -1, -1)

    def random_inputs(self, dtype: torch.dtype, device: torch.device) -> "Inputs":
        """Return random inputs that require gradients."""

        def randn(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(size, dtype=dtype, device=device)

        point_dtype = reference.compute_dtype(dtype)
        spatial_shapes = torch.tensor(self.levels, device=device)
        pixels = spatial_shapes.prod(1)
        sizes = spatial_shapes.flip(1)[:, None]  # (L, 1, 2): W, H
        points = self.n, self.queries, self.heads, len(self.levels), self.points

        centers = self.reference_points(device)[:, :, None, None, None].to(point_dtype)
        offsets = SPREAD * randn(*points, 2, dtype=point_dtype)
        locations = (away_from_integers(centers * sizes - 0.5 + offsets) + 0.5) / sizes
        logits = randn(*points, dtype=point_dtype).flatten(3)
        packed = torch.cat((locations.flatten(3), logits), dim=-1)
        return Inputs(
            value=randn(self.n, self.pixels, self.heads, self.head_channels).requires_grad_(),
            locations=locations.requires_grad_(),
            weights=logits.softmax(-1).unflatten(-1, points[3:]).requires_grad_(),
            packed=packed.requires_grad_(),
            levels=(spatial_shapes, pixels.cumsum(0) - pixels),
            grad_output=randn(self.n, self.queries, self.heads * self.head_channels),
            shape=self,
        )


SHAPES = {
    "dino-encoder": Shape(1, "dino-encoder"),
    "dino-decoder": Shape(1, "dino-decoder", decoder_queries=900),
}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Inputs of all implementations."""

    value: Tensor  # (N, S, M, D)
    locations: Tensor  # (N, Lq, M, L, K, 2)
    weights: Tensor  # (N, Lq, M, L, K)
    packed: Tensor  # (N, Lq, M, 3 * L * K), locations and logits of the weights
    levels: tuple[Tensor, Tensor]  # spatial_shapes (L, 2) and level_start_index (L,)
    grad_output: Tensor  # (N, Lq, M * D)
    shape: Shape

    @property
    def separate(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the arguments of operators with separate locations and weights."""
        return self.value, *self.levels, self.locations, self.weights

    @property
    def fused(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        """Return the arguments of the fused operator."""
        return self.value, *self.levels, self.packed, self.shape.points


def load_mmcv(module: str) -> ModuleType:
    """Import a module of mmcv, which may have no compiled operators."""
    load("flash_internimage.openmmlab")
    return load(module)


def run_mmcv_pytorch(inputs: Inputs) -> Tensor:
    """Run mmcv's PyTorch implementation in the dtype of the locations, as under autocast."""
    function = load_mmcv("mmcv.ops.multi_scale_deform_attn").multi_scale_deformable_attn_pytorch
    value = inputs.value.to(inputs.locations.dtype)
    output = function(value, inputs.levels[0], inputs.locations, inputs.weights)
    return output.to(inputs.value.dtype)


def run_mmcv_cuda(inputs: Inputs) -> Tensor:
    """Run mmcv's CUDA operator, which casts locations and weights to the dtype of value."""
    function = load_mmcv("mmcv.ops.multi_scale_deform_attn").MultiScaleDeformableAttnFunction
    require(inputs.value.device.type == "cuda", "CUDA only")
    require(inputs.value.dtype != torch.bfloat16, "not for bfloat16")
    compiler = load_mmcv("mmcv.ops").get_compiling_cuda_version()
    require(compiler != "not available", "built without CUDA")
    return function.apply(*inputs.separate, IMAGES_PER_STEP)


SEPARATE, FUSED = ("value", "locations", "weights"), ("value", "packed")
REFERENCE = Competitor(lambda i: run_reference("ms_deform_attn", *i.separate), SEPARATE)
FUSED_REFERENCE = Competitor(lambda i: run_reference("flash_deform_attn", *i.fused), FUSED)
Shape.references = [FUSED_REFERENCE, REFERENCE]
Shape.competitors = {
    "ms_deform_attn": Competitor(lambda inputs: ms_deform_attn(*inputs.separate), SEPARATE),
    "flash_deform_attn": Competitor(lambda inputs: flash_deform_attn(*inputs.fused), FUSED),
    "triton": Competitor(lambda inputs: run_triton("ms_deform_attn", *inputs.separate), SEPARATE),
    "reference": REFERENCE,
    "mmcv PyTorch": Competitor(run_mmcv_pytorch, SEPARATE),
    "mmcv CUDA": Competitor(run_mmcv_cuda, SEPARATE, tolerances=MMCV_TOLERANCES),
}
