"""Run the examples of docs/integrations.md."""

import pytest
import torch

from tests.guides import read_examples

EXAMPLES = read_examples("integrations", "python")


def test_example_of_transformers(monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    from tests.ops_dcnv4 import transformers_models

    small = transformers_models.build("deformable_detr")  # in place of a download
    monkeypatch.setattr(
        transformers.AutoModelForObjectDetection, "from_pretrained", lambda name: small
    )
    scope: dict = {}
    exec(EXAMPLES[0], scope)
    assert capsys.readouterr().out.startswith("patched 3 layers, skipped 0\n")
    assert scope["model"] is small
    assert not torch.equal(scope["after"], scope["before"])


def test_example_of_torchvision():
    scope: dict = {}
    exec(EXAMPLES[1], scope)
    layer, output = scope["layer"], scope["output"]
    assert (type(layer).__name__, type(layer)) != ("DeformConv2d", scope["DeformConv2d"])
    assert output.shape == (1, 64, 14, 14)
    assert output.isfinite().all()
