"""Find the layers of a model that sample with DCNv3 or DCNv4, and run a backbone up to one."""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ops_dcnv4 import DCNv3, DCNv4
from ops_dcnv4.modules.common import softmax_over_taps
from ops_dcnv4.window import Window

from ..backbones import Backbone
from ..inference import Predictor

# A FlashInternImage or InternImage, a model that contains one, or a predictor of such a model.
Model = nn.Module | Predictor


@dataclass(frozen=True)
class Layer:
    """A block of a backbone, which contains one DCNv3 or DCNv4 layer.

    Attributes:
        name: Name in the model, such as `backbone.levels.2.blocks.5`.
        backbone: The FlashInternImage or InternImage.
        stage: Index of the stage.
        block: Index of the block in the stage.
    """

    name: str
    backbone: Backbone
    stage: int
    block: int

    @property
    def module(self) -> nn.Module:
        """Return the block."""
        return self.backbone.get_submodule(f"levels.{self.stage}.blocks.{self.block}")

    @property
    def dcn(self) -> DCNv3 | DCNv4:
        """Return the DCNv3 or DCNv4 layer of the block."""
        dcn = self.module.dcn
        assert isinstance(dcn, (DCNv3, DCNv4))
        return dcn

    @property
    def stride(self) -> int:
        """Return the pixels of the image per pixel of the layer."""
        return self.backbone.feature_info[self.stage]["reduction"]

    def window(self) -> Window:
        """Return the parameters of the operator."""
        return self.dcn.window()

    def below(self) -> "Layer | None":
        """Return the previous block of the backbone; None for the first."""
        stage, block = self.stage, self.block - 1
        if block < 0:
            stage -= 1
            if stage < 0:
                return None
            block = len(_blocks(self.backbone, stage)) - 1
        prefix = self.name.removesuffix(f"levels.{self.stage}.blocks.{self.block}")
        return Layer(f"{prefix}levels.{stage}.blocks.{block}", self.backbone, stage, block)


def _blocks(backbone: Backbone, stage: int) -> Sequence[nn.Module]:
    blocks: Any = backbone.levels[stage].blocks
    return blocks


def module_of(model: Model) -> nn.Module:
    """Return the module of a predictor; other models are returned as they are."""
    return model.model if isinstance(model, Predictor) else model


def all_layers(model: Model) -> list[Layer]:
    """Return the layers of every backbone in a model, in the order of computation.

    Raises:
        ValueError: If there is no FlashInternImage or InternImage in the model.
    """
    model = module_of(model)
    layers = []
    for name, backbone in model.named_modules():
        if isinstance(backbone, Backbone):
            prefix = f"{name}." if name else ""
            layers += [
                Layer(f"{prefix}levels.{stage}.blocks.{block}", backbone, stage, block)
                for stage in range(len(backbone.levels))
                for block in range(len(_blocks(backbone, stage)))
            ]
    if not layers:
        kind = type(model).__name__
        raise ValueError(f"model must contain a FlashInternImage or InternImage, got {kind}")
    return layers


def list_layers(model: Model) -> list[str]:
    """Return the names of the layers with sampling points, in the order of computation.

    Args:
        model: A FlashInternImage or InternImage, a model that contains one, or a predictor.

    Raises:
        ValueError: If there is no FlashInternImage in the model.
    """
    return [layer.name for layer in all_layers(model)]


def last_of_stages(model: Model, name: str | None = None) -> list[str]:
    """Return the names of the last block of each stage, and of a further layer, in order.

    Args:
        model: A FlashInternImage or InternImage, a model that contains one, or a predictor.
        name: Further layer, as for :func:`find_layer`; its backbone is the one considered.

    Raises:
        ValueError: If there is no backbone in the model, or no layer of that name.
    """
    layers = all_layers(model)
    further = layers[0] if name is None else find_layer(model, name)
    layers = [layer for layer in layers if layer.backbone is further.backbone]
    chosen = {layer.stage: layer.name for layer in layers}.values()
    return [
        layer.name
        for layer in layers
        if layer.name in chosen or (name is not None and layer.name == further.name)
    ]


def find_layer(model: Model, name: str) -> Layer:
    """Return the layer with a name.

    Args:
        model: A FlashInternImage or InternImage, a model that contains one, or a predictor.
        name: Name of a block, or of the layer `dcn` in it. The prefix of the backbone may be
            omitted if there is one backbone.

    Raises:
        ValueError: If there is no backbone in the model, or `name` is not one of its layers.
    """
    layers = {layer.name: layer for layer in all_layers(model)}
    wanted = name.removesuffix(".dcn")
    found = [n for n in layers if n == wanted or n.endswith(f".{wanted}")]
    if len(found) == 1:
        return layers[found[0]]
    if found:
        raise ValueError(f"layer must be one of {', '.join(found)}, got {name!r}")
    raise ValueError(f"layer must be {_ranges(list(layers.values()))}, got {name!r}"
                     + _hint(module_of(model), list(layers), wanted))  # fmt: skip


def _ranges(layers: Sequence[Layer]) -> str:
    last = {layer.name.rpartition(".")[0]: layer.block for layer in layers}
    return " or ".join(f"{name}.0" + (f" to {end}" if end else "") for name, end in last.items())


def _hint(model: nn.Module, names: Sequence[str], wanted: str) -> str:
    inside = [name for name in names if f".{name}".find(f".{wanted}.") >= 0]
    if inside:
        return f", which contains {len(inside)} layers"
    modules = dict(model.named_modules())
    found = [name for name in modules if wanted and f".{name}".endswith(f".{wanted}")]
    if found:
        return f", a {type(modules[found[0]]).__name__} without sampling points"
    close = difflib.get_close_matches(wanted, [*names, *(_short(n) for n in names)], n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _short(name: str) -> str:
    return name[name.index("levels.") :]


@contextmanager
def evaluating(backbone: Backbone) -> Iterator[None]:
    """Put a backbone into evaluation mode without gradient checkpointing, and restore both."""
    training = [(module, module.training) for module in backbone.modules()]
    checkpointing = [(stage, stage.grad_checkpointing) for stage in backbone.levels]
    backbone.eval()
    backbone.set_grad_checkpointing(False)
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for stage, enabled in checkpointing:
            stage.grad_checkpointing = enabled  # type: ignore[assignment]


def run_to(layers: Sequence[Layer], modules: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """Return the outputs of modules of one backbone, which is run up to the last stage needed.

    Args:
        layers: Layers that contain the modules.
        modules: Modules whose outputs are returned.
        x: Images of shape (N, 3, H, W).
    """
    backbone = layers[0].backbone
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, arguments: Any, output: Tensor) -> None:
        outputs[module] = output

    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        with evaluating(backbone):
            last = max(layer.stage for layer in layers)
            backbone.forward_intermediates(x, [last], stop_early=True)
    finally:
        for hook in hooks:
            hook.remove()
    return [outputs[module] for module in modules]


@torch.no_grad()
def predict_offset_masks(layers: Sequence[Layer], x: Tensor) -> list[Tensor]:
    """Return the offsets and modulation that layers of one backbone predict for an image.

    Args:
        layers: Layers of one backbone.
        x: An image of shape (1, 3, H, W).

    Returns:
        For each layer, the `offset_mask` of :func:`ops_dcnv4.dcnv4`, of shape (1, H, W, P), on the
        CPU; float32, or float64 for a float64 model.
    """
    predictors = [_predictors(layer.dcn) for layer in layers]
    outputs = iter(run_to(layers, [module for each in predictors for module in each], x))
    masks = []
    for layer, modules in zip(layers, predictors, strict=True):
        predicted = [next(outputs) for _ in modules]
        dtype = torch.promote_types(predicted[0].dtype, torch.float32)
        masks.append(_offset_mask(layer.dcn, [tensor.to("cpu", dtype) for tensor in predicted]))
    return masks


def _predictors(dcn: DCNv3 | DCNv4) -> list[nn.Module]:
    return [dcn.offset_mask] if isinstance(dcn, DCNv4) else [dcn.offset, dcn.mask]


def _offset_mask(dcn: DCNv3 | DCNv4, predicted: Sequence[Tensor]) -> Tensor:
    """Return the outputs of :func:`_predictors` in the layout of DCNv4."""
    if isinstance(dcn, DCNv4):
        return predicted[0]
    offset, scores = predicted
    modulation = softmax_over_taps(scores, dcn.group)
    parts = [tensor.unflatten(3, (dcn.group, -1)) for tensor in (offset, modulation)]
    return torch.cat(parts, dim=4).flatten(3)
