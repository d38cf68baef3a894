"""DINO in the form that is exported."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..openmmlab.models.attention import use_flash_attention
from .deformable_encoder import encode, flatten_maps, grid_points, sizes_of, width_height
from .detectors import ExportableDetector, check_sigmoid, scale_boxes


class ExportableDINO(ExportableDetector):
    """DINO: `boxes` (N, objects, 4) in pixels, `scores` and `labels` (N, objects).

    The number of objects is that of the config, for every image; the best come first.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.traced = copy.deepcopy(model)
        use_flash_attention(self.traced)
        check_sigmoid(self.traced.get_submodule("bbox_head"))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Detect objects; see :class:`ExportableModel`."""
        model: Any = self.traced
        padded = self.pad(images)
        maps = model.extract_feat(padded)
        masks = _padding_masks(images, padded, maps)
        positions = [
            model.positional_encoding(mask) + model.level_embed[i].view(1, -1, 1, 1)
            for i, mask in enumerate(masks)
        ]
        ratios = torch.stack([model.get_valid_ratio(mask) for mask in masks], dim=1)  # (1, L, 2)
        # Pixels from 0 to 1 of the image without padding, (1, S, 2).
        points = torch.cat(
            [
                grid_points(*size, padded) / (ratios[:, i, None] * width_height(size, padded))
                for i, size in enumerate(sizes_of(maps))
            ],
            dim=1,
        )
        mask = flatten_maps([mask.unsqueeze(1) for mask in masks]).squeeze(-1)
        memory = encode(
            model.encoder.layers, maps, positions, points[:, :, None] * ratios[:, None], mask
        )
        proposals = self._proposals(points, maps)
        model.gen_encoder_output_proposals = lambda memory, mask, sizes: self._select(
            memory, mask, proposals
        )
        inputs, _ = model.pre_decoder(memory, mask, None)
        hidden, references = model.decoder(
            query=inputs["query"],
            value=memory,
            key_padding_mask=mask,
            self_attn_mask=None,
            reference_points=inputs["reference_points"],
            spatial_shapes=sizes_of(maps),
            level_start_index=None,
            valid_ratios=ratios,
            reg_branches=model.bbox_head.reg_branches,
        )
        scores, boxes = model.bbox_head(hidden, references)
        return self._best(scores[-1].sigmoid(), boxes[-1], images.shape[2:])

    def _proposals(self, points: Tensor, maps: list[Tensor]) -> Tensor:
        """Return a box (cx, cy, w, h) per pixel, (1, S, 4), larger at coarser levels."""
        sizes = [
            points.new_full((height * width, 2), 0.05 * 2.0**level)
            for level, (height, width) in enumerate(sizes_of(maps))
        ]
        return torch.cat([points, torch.cat(sizes)[None]], dim=-1)

    def _select(self, memory: Tensor, mask: Tensor, proposals: Tensor) -> tuple[Tensor, Tensor]:
        """Mask padding and boxes at the border, as `gen_encoder_output_proposals` does."""
        model: Any = self.traced
        inside = ((proposals > 0.01) & (proposals < 0.99)).all(-1, keepdim=True)
        unused = mask.unsqueeze(-1) | ~inside
        logits = torch.log(proposals / (1 - proposals)).masked_fill(unused, float("inf"))
        features = model.memory_trans_fc(memory.masked_fill(unused, 0.0))
        return model.memory_trans_norm(features), logits

    def _best(self, scores: Tensor, boxes: Tensor, size: torch.Size) -> tuple[Tensor, ...]:
        """Return the boxes, scores and labels of the highest scores of each image."""
        head: Any = self.traced.get_submodule("bbox_head")
        count = head.test_cfg.get("max_per_img", scores.shape[1])
        best, index = scores.flatten(1).topk(count)
        classes = scores.shape[2]
        query = (index // classes).unsqueeze(-1).expand(-1, -1, 4)
        return scale_boxes(boxes.gather(1, query), size), best, index % classes

    def eager(self, images: Tensor) -> tuple[Tensor, ...]:
        """Detect objects by mmdet."""
        found = self.predict_by_mmdet(images)
        return tuple(
            torch.stack([getattr(image, name) for image in found])
            for name in ("bboxes", "scores", "labels")
        )


def _padding_masks(images: Tensor, padded: Tensor, maps: list[Tensor]) -> list[Tensor]:
    """Return masks (1, H, W) of each map, True for padding."""
    size, padded_size = images.shape[2:], padded.shape[2:]

    def is_padding(axis: int, x: Tensor) -> Tensor:
        # The nearest pixel, as F.interpolate chooses it.
        index = torch.arange(x.shape[axis + 2], device=x.device)
        return index * padded_size[axis] // x.shape[axis + 2] >= size[axis]

    return [(is_padding(0, x)[:, None] | is_padding(1, x))[None] for x in maps]
