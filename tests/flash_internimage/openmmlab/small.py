"""A tiny model and a metric for fast runs."""

import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from torch import nn


class Model(BaseModel):
    def __init__(self, classes: int = 2):
        super().__init__()
        self.backbone = nn.Linear(3, 4)
        self.head = nn.Linear(4, classes)
        self.dtypes = set()

    def forward(self, inputs, mode="tensor"):
        out = self.head(self.backbone(torch.stack(inputs)))
        self.dtypes.add(out.dtype)
        return {"loss": out.square().mean()} if mode == "loss" else list(out)


class Score(BaseMetric):
    """Metric with preset scores, one per validation."""

    def __init__(self, scores: list[float]):
        super().__init__()
        self.scores = list(scores)

    def process(self, data_batch, data_samples) -> None:
        self.results.append(0)

    def compute_metrics(self, results: list) -> dict:
        return {"score": self.scores.pop(0)}
