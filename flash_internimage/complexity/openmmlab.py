"""Run detectors and segmentors of OpenMMLab on the meta device."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.models import CascadeRoIHead, DetectionTransformer, TwoStageDetector
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmseg.models import EncoderDecoder
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from torchvision.ops import roi_align

from ..inference.predictor import ModelSource
from ..openmmlab import use_flash_attention
from ..openmmlab.cli.config import read_config
from ..openmmlab.utils import build_without_memory
from .measure import Network, Size

# Regions of an image for the box and mask heads, in mmdet's configs.
PROPOSALS, MASKS = 1000, 100
TRAINED_PROPOSALS, TRAINED_MASKS = 512, 128


def build_network(source: ModelSource) -> Network:
    """Build the detector or segmentor of a config.

    Raises:
        ValueError: If it is neither a two-stage detector nor a detection transformer, such as DINO.
    """
    if source.config is None:
        raise ValueError(f"model must have a config, got {source.name}")
    cfg = read_config(source.config)
    # mmdet creates some parameters by `torch.Tensor(...)`, which ignores the default device.
    model = build_without_memory(cfg).to("meta")
    use_flash_attention(model)  # mmcv's layer reads the sizes of the levels.
    if isinstance(model, EncoderDecoder):
        return _segmentor(model, cfg)
    if isinstance(model, TwoStageDetector):
        return _two_stage(model)
    if isinstance(model, DetectionTransformer):
        return _transformer(model)
    raise ValueError(
        "model must be a segmentor, a two-stage detector or a detection transformer, got "
        f"{type(model).__name__}"
    )


class LevelsOnCPU(TorchDispatchMode):
    """Leave integers on the CPU that are copied to the meta device.

    mmdet reads the sizes of the levels from tensors, which meta tensors do not have.
    """

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: Any,
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operator on the meta device if one of its tensors is there."""
        options = dict(kwargs or {})
        if func is torch.ops.aten._to_copy.default and not args[0].is_floating_point():
            options.pop("device", None)
        elif any(isinstance(t, Tensor) and t.is_meta for t in tree_iter((args, options))):
            args, options = tree_map_only(Tensor, lambda t: t.to("meta"), (args, options))
        return func(*args, **options)


def _metainfo(images: Tensor) -> list[dict[str, Any]]:
    size = tuple(images.shape[2:])
    keys = ("img_shape", "ori_shape", "pad_shape", "batch_input_shape")
    return [dict.fromkeys(keys, size) for _ in images]


def _total(outputs: Any) -> Tensor:
    floats = [t for t in tree_iter(outputs) if isinstance(t, Tensor) and t.requires_grad]
    return torch.stack([t.float().sum() for t in floats]).sum()


def _segmentor(model: EncoderDecoder, cfg: Config) -> Network:
    height, width = cfg.model.data_preprocessor.size

    def predict(images: Tensor) -> Tensor:
        return model.encode_decode(images, _metainfo(images)).argmax(1)

    def loss(images: Tensor) -> Tensor:
        maps = model.extract_feat(images)
        heads = [model.decode_head]
        if model.with_auxiliary_head:
            heads.append(model.auxiliary_head)
        return torch.stack([_loss_of_head(head, maps, images) for head in heads]).sum()

    return Network(model, (height, 4 * width), predict, loss, LevelsOnCPU)


def _loss_of_head(head: Any, maps: Sequence[Tensor], images: Tensor) -> Tensor:
    if not hasattr(head, "loss_decode"):  # Mask2Former
        return _total(head(maps, [DetDataSample(metainfo=info) for info in _metainfo(images)]))
    size = images.shape[2:]
    logits = F.interpolate(head(maps), size, mode="bilinear", align_corners=head.align_corners)
    return F.cross_entropy(logits, torch.empty(len(images), *size, dtype=torch.long))


def _two_stage(model: TwoStageDetector) -> Network:
    roi_head = model.roi_head
    cascaded = isinstance(roi_head, CascadeRoIHead)
    stages = range(roi_head.num_stages) if cascaded else [None]
    for module in roi_head.modules():
        if hasattr(module, "roi_layers"):
            module.forward = _Extractor(module)

    def run(images: Tensor, proposals: int, masks: int) -> list[Any]:
        maps = model.extract_feat(images)
        outputs = [model.rpn_head(maps)]
        regions = torch.empty(len(images) * proposals, 5)
        for stage in stages:
            which = [] if stage is None else [stage]
            outputs.append(roi_head._bbox_forward(*which, maps, regions))
            if roi_head.with_mask:
                few = regions[: len(images) * masks]
                outputs.append(roi_head._mask_forward(*which, maps, few))
        return outputs

    return Network(
        model,
        (800, 1280),
        lambda images: run(images, PROPOSALS, MASKS),
        lambda images: _total(run(images, TRAINED_PROPOSALS, TRAINED_MASKS)),
    )


class _Extractor:
    """Read all regions from the first map: which one mmdet chooses depends on their sizes."""

    def __init__(self, module: Any) -> None:
        layer = module.roi_layers[0]
        self.options = (layer.output_size, layer.spatial_scale, layer.sampling_ratio, layer.aligned)

    def __call__(self, maps: Sequence[Tensor], regions: Tensor, *_: Any) -> Tensor:
        return roi_align(maps[0], regions, *self.options)


def _transformer(model: DetectionTransformer) -> Network:
    def run(images: Tensor) -> Any:
        # In training, mmdet adds denoising queries, which depend on the objects in the images.
        model.training = False
        return model(images, [DetDataSample(metainfo=i) for i in _metainfo(images)], mode="tensor")

    size: Size = (800, 1280)
    return Network(model, size, run, lambda images: _total(run(images)), LevelsOnCPU)
