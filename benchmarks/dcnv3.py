"""DCNv3 benchmark: DCNv4 and DCNv3, both by this project and by the published packages.

The modulation of DCNv4 is the softmax that DCNv3 computes, so that all results are equal.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import dcnv4
from benchmarks.competitors import Competitor, Explicit, load, require, run_reference
from benchmarks.dcnv4 import TAPS
from ops_dcnv4 import dcnv3
from ops_dcnv4.modules.common import softmax_over_taps

IMAGES_PER_STEP = 256  # the published default


@dataclass(frozen=True)
class Shape(dcnv4.Shape):
    """Size of a call of DCNv4 or DCNv3 with a 3x3 window that keeps the image size."""

    def random_inputs(self, dtype: torch.dtype, device: torch.device) -> "Inputs":
        """Return random inputs that require gradients."""
        base = super().random_inputs(dtype, device)
        offset, logits = base.packed.detach().split([2 * TAPS, TAPS], dim=4)
        packed = torch.cat((offset, logits.softmax(-1)), dim=4).flatten(3)
        padding = base.offset_mask.shape[3] - packed.shape[3]
        return Inputs(
            value=base.value,
            offset_mask=F.pad(packed, (0, padding)).requires_grad_(),
            qkv=base.qkv,
            weight=base.weight,
            grad_output=base.grad_output,
            shape=self,
            offset=offset.flatten(3).requires_grad_(),
            logits=logits.flatten(3).requires_grad_(),
        )


@dataclass(frozen=True)
class Inputs(dcnv4.Inputs):
    """Inputs of all implementations."""

    offset: Tensor  # (N, H, W, 2 * TAPS * groups)
    logits: Tensor  # (N, H, W, TAPS * groups), of the modulation

    @property
    def modulation(self) -> Tensor:
        """Return the softmax over the taps of each group, (N, H, W, TAPS * groups)."""
        return softmax_over_taps(self.logits, self.shape.groups)


def run_dcnv3(inputs: Inputs) -> Tensor:
    """Run DCNv3 on the kernels of this project."""
    return dcnv3(inputs.value, inputs.offset, inputs.modulation, *inputs.window)


def run_dcnv3_reference(inputs: Inputs) -> Tensor:
    """Run the reference of DCNv4 after the softmax."""
    groups = inputs.shape.groups
    parts = (tensor.unflatten(3, (groups, -1)) for tensor in (inputs.offset, inputs.modulation))
    packed = torch.cat(tuple(parts), dim=4).flatten(3)
    return run_reference("dcnv4", inputs.value, packed, *inputs.window)


def run_published(inputs: Inputs) -> Tensor:
    """Run the operator of the published package DCNv3, version 1.1, after the softmax."""
    require(inputs.value.dtype != torch.bfloat16, "not for bfloat16")
    library, shape = load("DCNv3"), inputs.shape
    parameters = (3, 3, 1, 1, 1, 1, 1, 1, shape.groups, shape.group_channels, 1.0)

    def backward(grad_output: Tensor, *tensors: Tensor) -> Any:
        grad_output = grad_output.contiguous()
        return library.dcnv3_backward(*tensors, *parameters, grad_output, IMAGES_PER_STEP, 0)

    def forward(*tensors: Tensor) -> Tensor:
        return library.dcnv3_forward(*tensors, *parameters, IMAGES_PER_STEP, 0)

    operator: Any = SimpleNamespace(dcnv3=forward, dcnv3_backward=backward)
    return Explicit.apply(operator, "dcnv3", inputs.value, inputs.offset, inputs.modulation)


LEAVES = ("value", "offset", "logits")
Shape.references = [*dcnv4.Shape.references, Competitor(run_dcnv3_reference, LEAVES)]
Shape.competitors = {
    "DCNv4": dcnv4.Shape.competitors["ops_dcnv4"],
    "DCNv3": Competitor(run_dcnv3, LEAVES),
    "published DCNv4": dcnv4.Shape.competitors["published DCNv4"],
    "published DCNv3": Competitor(run_published, LEAVES),
}
