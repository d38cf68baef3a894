"""DINO as the published detectors were trained."""

from collections.abc import Sequence

import torch
from mmdet.models.dense_heads import DINOHead
from mmdet.models.detectors import DINO
from mmdet.models.layers import MLP, inverse_sigmoid
from mmengine.registry import MODELS
from torch import Tensor, nn

from .published_weights import LoadsPublishedWeights


class _EveryOtherFrequency(MLP):
    """MLP that uses every other frequency of the sine features of four coordinates."""

    def forward(self, x: Tensor) -> Tensor:
        # Split into (..., coordinate, pair of frequencies, frequency, sine and cosine).
        return super().forward(x.unflatten(-1, (4, -1, 2, 2))[..., 0, :].flatten(-3))


@MODELS.register_module()
class HalfWidthEncodingDINO(LoadsPublishedWeights, DINO):
    """DINO with half as many sine features per coordinate of a query as mmdet's: C / 2, not C.

    The published weights require this encoding. They load under their published names, too.

    onedl-mmdetection uses C features since 3.5.1, so its decoder does not match earlier weights.
    The frequencies of C / 2 features are every other frequency of C features.
    """

    def _init_layers(self) -> None:
        super()._init_layers()
        channels = self.embed_dims
        self.decoder.ref_point_head = _EveryOtherFrequency(2 * channels, channels, channels, 2)

    def init_weights(self) -> None:
        """Initialize the weights, the query embeddings from a standard normal distribution."""
        super().init_weights()
        nn.init.normal_(self.query_embedding.weight)  # mmdet 3: Xavier, much smaller


@MODELS.register_module()
class ClampedReferenceDINOHead(DINOHead):
    """DINOHead that clamps reference boxes as in the training of the published weights.

    Before the correction of a layer is added, its reference passes through an inverse sigmoid that
    is clamped at 1e-3. mmdet 3 clamps at 1e-5, where corrections of tiny boxes and of boxes near
    the image border have hardly any effect.
    """

    def forward(self, hidden_states: Tensor, references: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Predict classes and boxes for the queries of every decoder layer.

        Args:
            hidden_states: Outputs of the decoder layers, (layers, N, queries, C).
            references: Reference boxes of each layer, (N, queries, 4), as (cx, cy, w, h) from 0
                to 1. Further items, such as the result of the last layer, are ignored.

        Returns:
            Class logits, (layers, N, queries, classes), and boxes, (layers, N, queries, 4), as
            (cx, cy, w, h) from 0 to 1.
        """
        scores, boxes = [], []
        for i, hidden in enumerate(hidden_states):
            reference = inverse_sigmoid(references[i], eps=1e-3)
            scores.append(self.cls_branches[i](hidden))
            boxes.append((self.reg_branches[i](hidden) + reference).sigmoid())
        return torch.stack(scores), torch.stack(boxes)
