"""Tests of training at several image sizes."""

from collections.abc import Iterator
from itertools import count, islice

import pytest
import torch

from flash_internimage.classification.config import ConfigError
from flash_internimage.classification.data import set_epoch
from flash_internimage.classification.random_numbers import seed_everything
from tests.classification.helpers import build


def drawn_sizes(trainer, epoch: int) -> list[int]:
    """Return the image size of each batch of an epoch."""
    set_epoch(trainer.train_loader, epoch)
    choices = [{choice for _, choice in batch} for batch in trainer.train_loader.batch_sampler]
    return [trainer.cfg.data.image_sizes[choice] for (choice,) in choices]


def test_batches_have_the_drawn_sizes(config):
    trainer = build(config(data={"image_sizes": [24, 40]}))
    drawn = drawn_sizes(trainer, 0)
    assert set(drawn) == {24, 40}
    shapes = [tuple(images.shape) for images, _ in trainer.train_loader]
    assert shapes == [(12, 3, size, size) for size in drawn]


def test_random_sizes_repeat_with_the_seed_and_the_epoch(config):
    sizes = [24, 32, 40]
    first, again = (build(config(data={"image_sizes": sizes})) for _ in range(2))
    drawn = [drawn_sizes(first, epoch) for epoch in range(4)]
    assert {size for epoch in drawn for size in epoch} == set(sizes)
    assert len(set(map(tuple, drawn))) > 1
    assert [drawn_sizes(again, epoch) for epoch in (2, 1)] == [drawn[2], drawn[1]]
    other = build(config(data={"image_sizes": sizes}, seed=1))
    assert [drawn_sizes(other, epoch) for epoch in range(4)] != drawn


def test_progressive_sizes_go_from_the_first_to_the_last(config):
    data = {"image_sizes": [24, 32, 40], "size_schedule": "progressive"}
    trainer = build(config(data=data, schedule={"epochs": 8, "warmup_epochs": 0}))
    per_epoch = [drawn_sizes(trainer, epoch) for epoch in range(8)]
    assert all(len(set(sizes)) == 1 for sizes in per_epoch)
    assert [sizes[0] for sizes in per_epoch] == [24, 24, 32, 32, 32, 32, 40, 40]


def repeatable(trainer) -> Iterator[list[torch.Tensor]]:
    """Yield batches, each augmented with the random numbers of its number."""
    batches = iter(trainer.train_loader)
    for i in count():
        seed_everything(i)
        yield next(batches)


@pytest.mark.parametrize("schedule", ["random", "progressive"])
def test_a_single_size_gives_the_images_of_image_size(config, schedule):
    """Neither the order of the images nor their augmentation depends on the sampler."""
    plain = build(config())
    single = build(config(data={"image_sizes": [32], "size_schedule": schedule}))
    assert len(plain.train_loader) == len(single.train_loader) == plain.updates_per_epoch == 5
    set_epoch(plain.train_loader, 1)
    set_epoch(single.train_loader, 1)
    for (images, labels), (others, other_labels) in zip(
        islice(repeatable(plain), 2), repeatable(single), strict=False
    ):
        assert torch.equal(labels, other_labels)
        assert torch.equal(images, others)


def test_every_image_is_used_once_per_epoch(config):
    trainer = build(config(data={"image_sizes": [24, 32]}))
    seen = [index for batch in trainer.train_loader.batch_sampler for index, _ in batch]
    assert sorted(seen) == list(range(60))


def test_validation_uses_image_size(config):
    trainer = build(config(data={"image_sizes": [24, 40]}))
    assert {images.shape[-1] for images, _ in trainer.val_loader} == {32}


def test_the_model_must_accept_every_size(config):
    model = {"name": "vit_tiny_patch16_224", "args": {"depth": 1, "img_size": 32}}
    cfg = config(model=model, data={"image_sizes": [32, 48]})
    with pytest.raises(ConfigError, match=r"images of data\.image_sizes=48 with 3 channels"):
        build(cfg)


def test_streams_have_one_size(change):
    from types import SimpleNamespace

    from flash_internimage.classification.data import SkippingStream, train_loader

    stream = SkippingStream(SimpleNamespace(), True, "wds/")
    cfg = change(**{"data.image_sizes": [24, 32], "data.kind": "wds/"})
    with pytest.raises(ConfigError, match=r"image_sizes must be empty for data\.kind=wds/"):
        train_loader(stream, cfg, torch.device("cpu"), 0, 1)
