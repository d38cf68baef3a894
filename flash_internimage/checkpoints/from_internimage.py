"""Initialize FlashInternImage from the weights of an InternImage."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ops_dcnv4 import DCNv4

from .weights import check_finite

if TYPE_CHECKING:
    from ..backbones import FlashInternImage

_logger = logging.getLogger(__name__)

# Names in DCNv3 by those in DCNv4, apart from the prediction of offsets and modulation.
_RENAMED = {
    "offset_mask_dw.weight": "dw_conv.0.weight",
    "offset_mask_dw.bias": "dw_conv.0.bias",
    "value_proj.weight": "input_proj.weight",
    "value_proj.bias": "input_proj.bias",
}

_PREDICTION = ("offset.weight", "offset.bias", "mask.weight", "mask.bias")


@dataclass(frozen=True)
class Transfer:
    """What was carried over from an InternImage to a FlashInternImage.

    Attributes:
        copied: Parameters and buffers of the FlashInternImage that were copied.
        converted: Those that were computed from several of the InternImage.
        kept: Those that keep their values.
        unused: Parameters and buffers of the InternImage that have no counterpart.
    """

    copied: list[str]
    converted: list[str]
    kept: list[str]
    unused: list[str]


def load_internimage(
    model: "FlashInternImage", state_dict: Mapping[str, Tensor], offset_scale: float | None = None
) -> Transfer:
    """Initialize a FlashInternImage in place from the weights of an InternImage.

    Weights are copied where names and shapes agree, so the two should have the same size. The two
    layers that predict offsets and modulation become one. The softmax over the taps is replaced by
    its first-order approximation, and the norm and the activation before these layers have no
    counterpart. The model therefore computes something else at first: it is a start for
    fine-tuning.

    Args:
        model: Model to initialize.
        state_dict: Weights of an InternImage, from :func:`clean_state_dict`.
        offset_scale: Offset scale of the InternImage, which is 2 in L and XL and 1 in other sizes;
            None for that of the model. A different scale is compensated for by the offsets.

    Returns:
        What was carried over, which is also logged.

    Raises:
        ValueError: If the weights are not finite, not floating-point or not those of an
            InternImage, or `offset_scale` is not positive.
    """
    if offset_scale is not None and not offset_scale > 0:
        raise ValueError(f"offset_scale must be positive, got {offset_scale!r}")
    if not any(".dcn.dw_conv." in name for name in state_dict):
        raise ValueError(
            "state_dict must contain the weights of an InternImage, whose names contain "
            f"'.dcn.dw_conv.', got {len(state_dict)} others"
        )
    check_finite(state_dict)
    for name, tensor in state_dict.items():
        if not tensor.is_floating_point() and not name.endswith(".num_batches_tracked"):
            raise ValueError(f"weights must be floating-point, got {tensor.dtype} in {name}")
    own, copied, converted = model.state_dict(), [], []
    used: set[str] = set()
    for prefix, dcn in _layers(model):
        sources = {n: f"{prefix}{n}" for n in _PREDICTION}
        dtype = dcn.offset_mask.get_parameter("weight").dtype  # 8-bit floats have no arithmetic.
        found = {n: state_dict[s].to(dtype) for n, s in sources.items() if s in state_dict}
        joined = _join(dcn, found, offset_scale or dcn.offset_scale)
        own |= {f"{prefix}offset_mask.{kind}": tensor for kind, tensor in joined.items()}
        converted += [f"{prefix}offset_mask.{kind}" for kind in joined]
        used.update(sources.values() if joined else ())
    for name, tensor in own.items():
        head, dot, tail = name.partition(".dcn.")
        source = f"{head}{dot}{_RENAMED.get(tail, tail)}"
        weight = state_dict.get(source)
        if weight is not None and weight.shape == tensor.shape and name not in converted:
            own[name] = weight
            copied.append(name)
            used.add(source)
    model.load_state_dict(own)
    kept = [name for name in own if name not in {*copied, *converted}]
    unused = [name for name in state_dict if name not in used]
    _logger.info(
        "initialized from an InternImage: %d tensors copied, %d converted, %d kept as they were; "
        "%d of %d in the checkpoint have no counterpart",
        len(copied), len(converted), len(kept), len(unused), len(state_dict),
    )  # fmt: skip
    return Transfer(copied, converted, kept, unused)


def _layers(model: "FlashInternImage") -> list[tuple[str, DCNv4]]:
    return [(f"{n}.", m) for n, m in model.named_modules() if isinstance(m, DCNv4)]


def _join(dcn: DCNv4, found: Mapping[str, Tensor], offset_scale: float) -> dict[str, Tensor]:
    """Return the weight and bias of `offset_mask`; none if the shapes do not agree."""
    groups, taps = dcn.group, dcn.taps
    expected = {
        "offset.weight": (2 * groups * taps, dcn.channels),
        "offset.bias": (2 * groups * taps,),
    }
    expected |= {"mask.weight": (groups * taps, dcn.channels), "mask.bias": (groups * taps,)}
    if {name: tuple(tensor.shape) for name, tensor in found.items()} != expected:
        return {}
    joined = {}
    for kind in ("weight", "bias"):
        # scale * (grid + offset) is to be the same with both scales.
        ratio = offset_scale / dcn.offset_scale
        offsets = ratio * found[f"offset.{kind}"].unflatten(0, (groups, 2 * taps))
        # softmax(m) = 1 / K + (m - mean(m)) / K up to terms of second order.
        scores = found[f"mask.{kind}"].unflatten(0, (groups, taps))
        scores = (scores - scores.mean(1, keepdim=True)) / taps
        if kind == "bias":
            offsets = offsets + (ratio - 1) * _grid(dcn).flatten()
            scores = scores + 1 / taps
        rows = torch.zeros_like(dcn.offset_mask.get_parameter(kind)).detach()
        rows[: 3 * groups * taps] = torch.cat([offsets, scores], 1).flatten(0, 1)
        joined[kind] = rows
    return joined


def _grid(dcn: DCNv4) -> Tensor:
    """Return the positions (dx, dy) of the taps without offsets, column by column."""
    height, width = dcn.kernel_size
    x = dcn.dilation[1] * (torch.arange(width).repeat_interleave(height) - (width - 1) / 2)
    y = dcn.dilation[0] * (torch.arange(height).repeat(width) - (height - 1) / 2)
    grid = torch.stack([x, y], dim=1)
    kept = [
        k for k in range(len(grid)) if not (dcn.remove_center and k == dcn.window().center_tap())
    ]
    return grid[kept]
