"""Tests of streams of images that fail, end early or differ between processes."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import IterableImageDataset
from torch.utils.data import DataLoader

from flash_internimage.classification import engine, state
from flash_internimage.classification.config import ConfigError, Data
from flash_internimage.classification.data import (
    SKIPPED,
    SkippingStream,
    TooManyCorruptImages,
    build_dataset,
    val_loader,
)
from flash_internimage.classification.data import datasets as datasets_module
from flash_internimage.classification.engine import Trainer
from tests.classification.helpers import CPU


class Reader:
    """Reader that yields two images and then fails."""

    def __iter__(self):
        yield Image.new("RGB", (4, 4)), 1
        yield Image.new("RGB", (1, 4000)), 1
        raise TypeError("of the decoder")

    def __len__(self):
        return 3


class TestStreams:
    @pytest.mark.parametrize("workers", [0, 1])
    def test_an_error_of_the_reader_is_reported_in_one_line(self, workers):
        dataset = SkippingStream(Reader(), True, "wds/")
        dataset.transform = lambda image: torch.zeros(1)
        with pytest.raises(TooManyCorruptImages) as error:
            list(DataLoader(dataset, num_workers=workers))
        message = "data.kind=wds/: cannot read the stream: TypeError: of the decoder"
        assert str(error.value) == message

    @pytest.mark.parametrize(("is_training", "labels"), [(True, [1]), (False, [1, SKIPPED])])
    def test_an_image_with_an_extreme_aspect_ratio_is_skipped(self, is_training, labels):
        dataset = SkippingStream(Reader(), is_training, "wds/")
        dataset.transform = lambda image: image
        images = iter(dataset)
        assert [next(images)[1] for _ in labels] == labels
        with pytest.raises(TooManyCorruptImages):
            next(images)

    def test_streams_skip_unreadable_images(self, monkeypatch):
        stream = IterableImageDataset(None, reader=Reader())
        monkeypatch.setattr(datasets_module, "create_dataset", lambda *args, **kwargs: stream)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
        dataset = build_dataset(Data(kind="wds/", root="."), "val", False, 8)
        assert isinstance(dataset, SkippingStream)
        assert len(dataset) == 3


class Numbers:
    """Reader of plain images with the index as red value, and labels from 0 to 2."""

    def __init__(self, count: int, length: int | None = None):
        self.count, self.length = count, count if length is None else length

    def __iter__(self):
        return ((Image.new("RGB", (8, 8), (i, 0, 0)), i % 3) for i in range(self.count))

    def __len__(self):
        return self.length


class TestCompleteStreams:
    @pytest.mark.slow
    @pytest.mark.parametrize("world_size", [1, 2, 3])
    def test_several_processes_evaluate_every_image_once(self, monkeypatch, world_size):
        seen = []
        for rank in range(world_size):
            monkeypatch.setattr(datasets_module, "rank", lambda rank=rank: rank)
            monkeypatch.setattr(datasets_module, "world_size", lambda: world_size)
            dataset = SkippingStream(Numbers(7), False, "wds/")
            data = Data(image_size=8, workers=0, mean=(0, 0, 0), std=(1, 1, 1))
            batches = list(val_loader(dataset, data, 2, CPU, rank, world_size))
            assert sum(len(labels) for _, labels in batches) == len(dataset)
            seen += [round(255 * x.item()) for images, _ in batches for x in images[:, 0, 0, 0]]
        assert sorted(seen) == list(range(7))

    def test_readers_of_timm_do_not_split_evaluation_images_over_processes(self, monkeypatch):
        monkeypatch.setattr(datasets_module, "world_size", lambda: 2)
        reader = Numbers(4)
        reader.dist_rank, reader.dist_num_replicas = 1, 2
        SkippingStream(reader, True, "wds/")
        assert (reader.dist_rank, reader.dist_num_replicas) == (1, 2)
        SkippingStream(reader, False, "wds/")
        assert (reader.dist_rank, reader.dist_num_replicas) == (0, 1)

    def test_16_bit_images_are_not_clipped(self):
        ramp = Image.fromarray(np.arange(65536, dtype=np.uint16).reshape(256, 256))
        dataset = SkippingStream([(ramp, 1)], False, "wds/")
        dataset.transform = np.asarray
        assert len(np.unique(next(iter(dataset))[0])) == 256

    @pytest.mark.parametrize(("is_training", "labels"), [(True, [1, 2]), (False, [1, SKIPPED, 2])])
    def test_an_image_that_cannot_be_converted_is_skipped(self, is_training, labels):
        images = (Image.new("RGB", (8, 8)), Image.new("F", (8, 8)), Image.new("L", (8, 8)))
        dataset = SkippingStream(zip(images, (1, 0, 2), strict=True), is_training, "wds/")
        dataset.transform = np.asarray
        assert [label for _, label in dataset] == labels

    @pytest.mark.parametrize("label", [-1, None, "cat", (1, 2)])
    def test_an_image_without_label_is_a_one_line_error(self, label):
        dataset = SkippingStream([(Image.new("RGB", (8, 8)), label)], False, "hfids/")
        with pytest.raises(
            ValueError, match=re.escape(f"labels must be integers >= 0, got {label!r}; every")
        ):
            next(iter(dataset))

    @pytest.fixture
    def stream(self, config, monkeypatch):
        """Return a function that builds a Trainer whose training images are a stream."""

        def build(reader, **changes) -> Trainer:
            whole = state.build_dataset

            def build_dataset(data, split, is_training, batch_size):
                if is_training:
                    return SkippingStream(reader, True, "wds/")
                return whole(data, split, is_training, batch_size)

            monkeypatch.setattr(state, "build_dataset", build_dataset)
            return Trainer(config(batch_size=4, **changes), CPU)

        return build

    def test_the_early_end_of_a_stream_is_logged(self, stream, caplog):
        trainer = stream(Numbers(10, length=20))
        trainer.train_epoch()
        assert (trainer.update, trainer.updates_per_epoch) == (2, 5)
        assert "epoch 1: the training stream ended after 2 of 5 optimizer steps" in caplog.text

    def test_all_processes_end_the_epoch_together(self, stream, monkeypatch):
        trainer = stream(Numbers(20))
        asked = []

        def all_agree(yes, device):
            asked.append(yes)
            return len(asked) < 3

        monkeypatch.setattr(trainer, "train_update", lambda batches: 1.0)
        monkeypatch.setattr(engine, "all_agree", all_agree)
        trainer.train_epoch()
        assert (asked, trainer.update) == ([True, True, True], 2)

    def test_a_stream_without_images_is_a_one_line_error(self, stream):
        with pytest.raises(TooManyCorruptImages, match="ended before the first optimizer step"):
            stream(Numbers(0, length=20)).train_epoch()

    @pytest.mark.parametrize(
        ("length", "message"),
        [
            (0, "data.kind= must provide the number of training images"),
            (3, "at least the 4 images of one optimizer step per process, got 3"),
        ],
    )
    def test_a_stream_of_unknown_or_short_length_is_a_one_line_error(self, stream, length, message):
        with pytest.raises(ConfigError, match=message):
            stream(Numbers(20, length=length))

    def test_pictures_that_cannot_be_drawn_do_not_end_a_run(self, config, monkeypatch, caplog):
        def fail(*arguments):
            raise TooManyCorruptImages("the stream is gone")

        trainer = Trainer(config(), CPU)
        trainer.output.mkdir()
        (trainer.output / "metrics.csv").write_text("epoch,train_loss,val_top1,lr\n1,1,1,1\n")
        monkeypatch.setattr(engine, "save_predictions", fail)
        trainer.report()
        assert "cannot draw predictions.png: the stream is gone" in caplog.text
        assert (trainer.output / "curves.png").exists()
