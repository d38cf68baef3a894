"""Mask R-CNN and Cascade Mask R-CNN in the form that is exported."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms, roi_align

from .detectors import ExportableDetector, check_sigmoid


class ExportableTwoStage(ExportableDetector):
    """A detector with proposals: `boxes` (n, 4) in pixels, `scores` and `labels` (n,).

    With masks, `masks` is (n, H, W), True for the pixels of an object. There is one image, as the
    number of objects differs between images.
    """

    dynamic_batch = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        parts: Any = model
        check_sigmoid(parts.rpn_head)
        for settings in (parts.rpn_head.test_cfg, parts.roi_head.test_cfg):
            if settings.nms.get("type", "nms") != "nms" or settings.nms.get("class_agnostic"):
                raise ValueError(f"nms must be of type 'nms' within each class, got {settings.nms}")
        if parts.with_mask:
            self.outputs = (*self.outputs, "masks")

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Detect objects; see :class:`~.models.ExportableModel`."""
        model: Any = self.model
        size = images.shape[2:]
        maps = model.extract_feat(self.pad(images))
        proposals = self._propose(maps, size)
        boxes, scores, labels = self._classify(maps, proposals, size)
        if not model.with_mask:
            return boxes, scores, labels
        probabilities = self._segment(maps, boxes, labels)
        masks = paste(probabilities, boxes, size) >= model.roi_head.test_cfg.mask_thr_binary
        return boxes, scores, labels, masks

    def _propose(self, maps: Sequence[Tensor], size: torch.Size) -> Tensor:
        """Return proposals (n, 4), best first."""
        head: Any = self.model.rpn_head
        settings = head.test_cfg
        class_scores, deltas = head(maps)
        sizes = [x.shape[-2:] for x in class_scores]
        anchors = head.prior_generator.grid_priors(sizes, device=maps[0].device)
        chosen = []
        for level, (logits, delta, anchor) in enumerate(
            zip(class_scores, deltas, anchors, strict=True)
        ):
            scores = logits[0].permute(1, 2, 0).flatten().sigmoid()
            best, order = scores.sort(descending=True)
            order = order[: settings.nms_pre]
            delta = delta[0].permute(1, 2, 0).reshape(-1, 4)[order]
            group = torch.full_like(order, level)
            chosen.append((best[: settings.nms_pre], anchor[order], delta, group))
        scores, anchor, delta, group = (torch.cat(part) for part in zip(*chosen, strict=True))
        boxes = head.bbox_coder.decode(anchor, delta, max_shape=size)
        if settings.get("min_bbox_size", -1) >= 0:
            extent = boxes[:, 2:] - boxes[:, :2]
            large = (extent > settings.min_bbox_size).all(1).nonzero().squeeze(1)
            boxes, scores, group = boxes[large], scores[large], group[large]
        kept = nms_by_group(boxes, scores, group, settings.nms.iou_threshold, size)
        return boxes[kept[: settings.max_per_img]]

    def _classify(
        self, maps: Sequence[Tensor], proposals: Tensor, size: torch.Size
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the boxes, scores and labels of the objects, best first."""
        roi_head: Any = self.model.roi_head
        settings = roi_head.test_cfg
        heads, extractors = _stages(roi_head, "bbox_head", "bbox_roi_extractor")
        # Decoding boxes distinguishes empty tensors; there is always a proposal.
        torch._check(proposals.shape[0] > 0)
        logits, deltas = [], proposals
        for stage, (head, extractor) in enumerate(zip(heads, extractors, strict=True)):
            class_logits, deltas = head(extract(extractor, maps, proposals))
            logits.append(class_logits)
            if stage < len(heads) - 1:
                best = class_logits[:, :-1].argmax(1)
                metainfo = {"img_shape": size}
                proposals = head.regress_by_class(proposals, best, deltas, metainfo)
        head = heads[-1]
        scores = (sum(logits) / len(logits)).softmax(-1)[:, :-1]
        classes = scores.shape[1]
        if head.reg_class_agnostic:
            boxes = head.bbox_coder.decode(proposals, deltas, max_shape=size)
            boxes = boxes.repeat_interleave(classes, dim=0)
        else:
            repeated = proposals.repeat_interleave(classes, dim=0)
            boxes = head.bbox_coder.decode(repeated, deltas.reshape(-1, 4), max_shape=size)
        scores = scores.flatten()
        found = (scores > settings.score_thr).nonzero().squeeze(1)
        boxes, scores, labels = boxes[found], scores[found], found % classes
        kept = nms_by_group(boxes, scores, labels, settings.nms.iou_threshold, size)
        kept = kept[: settings.max_per_img]
        return boxes[kept], scores[kept], labels[kept]

    def _segment(self, maps: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        """Return the probability of each pixel of a box to belong to its object, (n, h, w)."""
        heads, extractors = _stages(self.model.roi_head, "mask_head", "mask_roi_extractor")
        stages = [
            head(extract(extractor, maps, boxes)).sigmoid()
            for head, extractor in zip(heads, extractors, strict=True)
        ]
        masks = torch.stack(stages).mean(0)
        if heads[-1].class_agnostic:
            return masks[:, 0]
        index = labels[:, None, None, None].expand(-1, 1, *masks.shape[2:])
        return masks.gather(1, index).squeeze(1)

    def eager(self, images: Tensor) -> tuple[Tensor, ...]:
        """Detect objects by mmdet."""
        (found,) = self.predict_by_mmdet(images)
        names = {"boxes": "bboxes"}
        return tuple(getattr(found, names.get(name, name)) for name in self.outputs)


def _stages(roi_head: Any, head: str, extractor: str) -> tuple[list[Any], list[Any]]:
    """Return the heads and extractors of all stages; those of masks may share an extractor."""
    heads, extractors = (
        [*part] if isinstance(part, nn.ModuleList) else [part]
        for part in (getattr(roi_head, head), getattr(roi_head, extractor))
    )
    return heads, extractors


def extract(extractor: Any, maps: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """Return the features of boxes, as mmdet's SingleRoIExtractor does.

    Args:
        extractor: The extractor.
        maps: Feature maps (1, C, H, W), finest first.
        boxes: (n, 4).

    Returns:
        (n, C, h, w), each box from the map of its size.
    """
    rois = torch.cat([boxes.new_zeros((boxes.shape[0], 1)), boxes], dim=1)
    levels = extractor.map_roi_levels(rois, extractor.num_inputs)
    layers = extractor.roi_layers
    features = maps[0].new_zeros((boxes.shape[0], maps[0].shape[1], *layers[0].output_size))
    for level, layer in enumerate(layers):
        index = (levels == level).nonzero().squeeze(1)
        part = roi_align(
            maps[level],
            rois[index],
            layer.output_size,
            layer.spatial_scale,
            layer.sampling_ratio,
            layer.aligned,
        )
        features = features.index_put((index,), part)
    return features


def nms_by_group(
    boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float, size: torch.Size
) -> Tensor:
    """Return the indices of boxes that no better box of their group overlaps, best first.

    Args:
        boxes: (n, 4), within the image.
        scores: (n,).
        groups: (n,), numbers of the groups.
        threshold: Intersection over union from which boxes overlap.
        size: Height and width of the image.
    """
    apart = torch.sym_max(size[0], size[1]) + 1
    return nms(boxes + (groups * apart).to(boxes.dtype)[:, None], scores, threshold)


def paste(masks: Tensor, boxes: Tensor, size: torch.Size) -> Tensor:
    """Return masks (n, h, w) of boxes as masks (n, H, W) of the image, as mmdet does."""
    height, width = size

    def coordinates(length: int, first: Tensor, last: Tensor) -> Tensor:
        pixels = torch.arange(length, device=boxes.device, dtype=boxes.dtype) + 0.5
        found = (pixels - first[:, None]) / (last - first)[:, None] * 2 - 1
        return torch.where(found.isinf(), 0.0, found)

    x0, y0, x1, y1 = boxes.unbind(1)
    x = coordinates(width, x0, x1)[:, None, :].expand(-1, height, -1)
    y = coordinates(height, y0, y1)[:, :, None].expand(-1, -1, width)
    grid = torch.stack([x, y], dim=-1)
    return F.grid_sample(masks[:, None], grid, align_corners=False).squeeze(1)
