"""What the detectors need beside flash_internimage.openmmlab, which is imported with it.

Importing this module replaces five names in mmdet's registries, so that they are right in configs
and inferencers that use mmdet's own: the image loaders LoadImageFromFile, LoadImageFromNDArray and
InferencerLoader, and the metrics CocoMetric and FasterCocoMetric.

custom_imports = dict(imports=['flash_internimage.openmmlab.detection'])
"""

from collections.abc import Sequence

import faster_coco_eval  # noqa: F401  mmdet's metric would miss it only after the first epoch
import torch
from mmdet.models.dense_heads import DINOHead
from mmdet.models.detectors import DINO
from mmdet.models.layers import MLP, inverse_sigmoid
from mmdet.registry import TRANSFORMS
from mmengine.registry import MODELS
from torch import Tensor, nn

from .coco import CheckedCocoDataset
from .coco_metric import CheckedCocoMetric, CheckedPycocotoolsMetric
from .files import LoadCheckedArray, LoadCheckedImage
from .published import LoadsPublishedWeights

__all__ = [
    "CheckedCocoDataset",
    "CheckedCocoMetric",
    "CheckedPycocotoolsMetric",
    "ClampedDINOHead",
    "PublishedDINO",
]

TRANSFORMS.register_module("LoadImageFromFile", module=LoadCheckedImage, force=True)
TRANSFORMS.register_module("LoadImageFromNDArray", module=LoadCheckedArray, force=True)
TRANSFORMS.register_module("InferencerLoader", module=LoadCheckedArray, force=True)


class _EveryOtherFrequency(MLP):
    """MLP on the sine features of four coordinates, of which it takes half the frequencies."""

    def forward(self, x: Tensor) -> Tensor:
        # (..., coordinate, pair of frequencies, frequency, sine and cosine)
        return super().forward(x.unflatten(-1, (4, -1, 2, 2))[..., 0, :].flatten(-3))


@MODELS.register_module()
class PublishedDINO(LoadsPublishedWeights, DINO):
    """DINO whose queries are encoded as in its published weights, by C / 2 features per coordinate.

    It takes these weights under their published names, too.

    onedl-mmdetection has C of them since 3.5.1, and so no weights from before fit its decoder. The
    frequencies of C / 2 features are every other one of those of C.
    """

    def _init_layers(self) -> None:
        super()._init_layers()
        channels = self.embed_dims
        self.decoder.ref_point_head = _EveryOtherFrequency(2 * channels, channels, channels, 2)

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.normal_(self.query_embedding.weight)  # mmdet 3: Xavier's, a tenth of it


@MODELS.register_module()
class ClampedDINOHead(DINOHead):
    """DINOHead that keeps the boxes' references away from the image's border as the published one.

    Before a layer's correction is added, the reference goes through the inverse sigmoid, which is
    clamped at 1e-3. mmdet 3 clamps at 1e-5, where corrections of boxes near the border, or of next
    to no size, have hardly an effect.
    """

    def forward(self, hidden_states: Tensor, references: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """
        Args:
            hidden_states: (layers, N, queries, C), of the decoder.
            references: of each layer, (N, queries, 4), (cx, cy, w, h) from 0 to 1; what follows,
                such as the last layer's result, is not used.

        Returns:
            Class scores before the sigmoid, (layers, N, queries, classes), and boxes,
            (layers, N, queries, 4), (cx, cy, w, h) from 0 to 1.
        """
        scores, boxes = [], []
        for i, hidden in enumerate(hidden_states):
            reference = inverse_sigmoid(references[i], eps=1e-3)
            scores.append(self.cls_branches[i](hidden))
            boxes.append((self.reg_branches[i](hidden) + reference).sigmoid())
        return torch.stack(scores), torch.stack(boxes)
