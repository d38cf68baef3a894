"""Images that cannot be read, folders with loops, damaged tar files, streams that break."""

import io
import os
import re
import shutil
import tarfile
import traceback
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from timm.data import IterableImageDataset
from torch.utils.data import DataLoader

from flash_internimage.classification import engine, state
from flash_internimage.classification.config import ConfigError, Data
from flash_internimage.classification.data import (
    SKIPPED,
    SkippingStream,
    TooManyCorruptImages,
    build_dataset,
    class_names,
    train_loader,
    val_loader,
)
from flash_internimage.classification.data import datasets as datasets_module
from flash_internimage.classification.engine import Trainer

CPU = torch.device("cpu")


@pytest.fixture
def root(digits, tmp_path):
    """A copy of the digits to damage."""
    return shutil.copytree(digits, tmp_path / "damaged")


def first(root, split: str, label: int):
    return min((root / split / str(label)).iterdir())


def dataset_of(root, split="val", is_training=False, **settings):
    data = Data(root=str(root), image_size=32, workers=0, **settings)
    dataset = build_dataset(data, split, is_training, 8)
    dataset.transform = lambda image: image
    return dataset


def skipped(caplog) -> list[str]:
    messages = [record.getMessage() for record in caplog.records]
    return [message for message in messages if message.startswith("skipped: ")]


class TestCount:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_file_counts_and_is_logged_once_however_often_it_is_met(
        self, config, root, caplog, workers
    ):
        first(root, "train", 3).write_text("no image")
        cfg = config(data={"root": str(root), "workers": workers, "max_corrupt": 1})
        dataset = build_dataset(cfg.data, "train", True, cfg.batch_size)
        loader = train_loader(dataset, cfg, CPU, 0, 1)
        for _ in range(3):
            assert sum(len(labels) for _, labels in loader) == 60
        assert dataset.corrupt == 1
        if not workers:  # those of workers are theirs
            assert len(skipped(caplog)) == 1

    def test_validation_counts_its_own_files(self, root):
        for split in ("train", "val"):
            first(root, split, 3).write_text("no image")
        for split in ("train", "val"):
            dataset = dataset_of(root, split, split == "train", max_corrupt=1)
            index = [path for path, _ in dataset.reader.samples].index(str(first(root, split, 3)))
            for _ in range(3):
                assert (dataset[index][1] == SKIPPED) == (split == "val")
            assert dataset.corrupt == 1

    def test_the_limit_is_that_of_all_workers_together(self, root):
        for label in (1, 8):
            first(root, "val", label).write_text("no image")
        data = Data(root=str(root), image_size=32, workers=2, max_corrupt=1)
        dataset = build_dataset(data, "val", False, 2)
        with pytest.raises(TooManyCorruptImages) as error:
            list(val_loader(dataset, data, 2, CPU))
        traceback.clear_frames(error.tb)  # ends the workers now; a garbage collection waits 10 s
        message = str(error.value)
        assert message.startswith("2 unreadable images are more than data.max_corrupt=1; the last")
        assert "\n" not in message

    def test_spawned_workers_count_too(self, root):
        first(root, "val", 3).write_text("no image")
        dataset = dataset_of(root)
        dataset.transform = None
        of_worker = ForkingPickler.loads(bytes(ForkingPickler.dumps(dataset)))
        of_worker.transform = lambda image: image
        assert of_worker[6][1] == SKIPPED
        assert dataset.corrupt == 1

    def test_a_split_without_any_readable_image_ends(self, root):
        for file in (root / "train").glob("*/*"):
            file.write_text("no image")
        with pytest.raises(TooManyCorruptImages, match="none of the 60 images"):
            dataset_of(root, "train", is_training=True)[7]

    def test_processes_count_together(self, root, monkeypatch):
        dataset = dataset_of(root, max_corrupt=1)
        first(root, "val", 0).write_text("no image")
        dataset[0]

        def of_another_process(flags, op):
            flags[5] = 1

        monkeypatch.setattr(datasets_module.dist, "all_reduce", of_another_process)
        with pytest.raises(TooManyCorruptImages, match="2 unreadable images"):
            dataset.share_unreadable(CPU)


class TestKinds:
    @pytest.mark.parametrize(
        "error",
        [NotImplementedError, IndexError, TypeError, OverflowError, MemoryError, AttributeError],
    )
    def test_any_error_of_a_decoder_is_an_unreadable_image(self, root, monkeypatch, caplog, error):
        broken = first(root, "val", 4)
        load = ImageFile.ImageFile.load

        def decode(image):
            if getattr(image, "filename", "") == str(broken):
                raise error("of the decoder")
            return load(image)

        monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
        dataset = dataset_of(root)
        labels = [dataset[i][1] for i in range(len(dataset))]
        assert labels.count(SKIPPED) == dataset.corrupt == 1
        assert f"{broken}: of the decoder" in skipped(caplog)[0]

    def test_a_damaged_qoi_file_is_an_unreadable_image(self, root):
        path = first(root, "val", 4)
        with Image.open(path) as image:
            image.convert("RGB").save(path.with_suffix(".qoi"))
        qoi = path.with_suffix(".qoi")
        path.unlink()
        qoi.rename(path)  # Pillow knows it by its first bytes
        path.write_bytes(path.read_bytes()[:40])
        dataset = dataset_of(root)
        assert sum(dataset[i][1] == SKIPPED for i in range(len(dataset))) == 1

    def test_an_error_of_the_conversion_is_an_unreadable_image(self, root, monkeypatch, caplog):
        def convert(image, mode):
            raise ValueError("conversion not supported")

        monkeypatch.setattr(Image.Image, "convert", convert)
        assert dataset_of(root)[0][1] == SKIPPED
        assert "conversion not supported" in skipped(caplog)[0]

    def test_neither_fifos_nor_loops_of_links_are_waited_for(self, root, caplog):
        fifo, loop, dangling = (first(root, "val", label) for label in (1, 2, 3))
        for path in (fifo, loop, dangling):
            path.unlink()
        os.mkfifo(fifo)
        loop.symlink_to(loop)
        dangling.symlink_to(root / "nowhere")
        dataset = dataset_of(root)
        assert sum(dataset[i][1] == SKIPPED for i in range(len(dataset))) == 3
        assert [str(p) in line for p, line in zip((fifo, loop, dangling), skipped(caplog),
                strict=True)] == [True] * 3  # fmt: skip

    def test_an_image_that_resizing_would_blow_up_is_left_out(self, root, caplog):
        Image.new("L", (1, 60000)).save(first(root, "val", 5))
        dataset = dataset_of(root)
        assert sum(dataset[i][1] == SKIPPED for i in range(len(dataset))) == 1
        assert "1 x 60000 pixels" in skipped(caplog)[0]

    def test_a_name_that_is_not_utf_8_can_be_logged(self, root, caplog):
        broken = first(root, "val", 5)
        renamed = os.path.join(os.fsencode(broken.parent), b"\xff.png")
        os.rename(broken, renamed)
        with open(renamed, "w") as file:
            file.write("no image")
        dataset = dataset_of(root)
        assert sum(dataset[i][1] == SKIPPED for i in range(len(dataset))) == 1
        assert r"\udcff.png" in skipped(caplog)[0].encode().decode()


class TestFolders:
    def test_a_link_that_leads_back_is_named(self, root):
        (root / "val" / "3" / "again").symlink_to(root / "val")
        with pytest.raises(ConfigError, match=r"symbolic link .*again leads back to"):
            dataset_of(root)

    def test_images_outside_of_the_class_folders_are_no_class(self, root):
        shutil.copy(first(root, "val", 3), root / "val" / "stray.png")
        with pytest.raises(ConfigError, match="a folder per class, but has images outside"):
            dataset_of(root)

    @pytest.mark.parametrize("kind", ["hdfs/cifar10", "wds", "nonsense/"])
    def test_an_unknown_kind_is_not_read_as_a_folder(self, kind):
        with pytest.raises(ValueError, match=r"must be empty or start with one of hfds/"):
            Data(kind=kind)


class TestTars:
    @pytest.fixture
    def tar(self, digits, tmp_path):
        names = {"0": "zero", "1": "one"}
        path = tmp_path / "val.tar"
        with tarfile.open(path, "w") as tar:
            for label, name in names.items():
                for image in sorted((digits / "val" / label).iterdir()):
                    tar.add(image, arcname=f"{name}/{image.name}")
        return path

    def test_classes_have_their_names(self, tar):
        dataset = dataset_of(tar)
        assert class_names(dataset, 3) == ["one", "zero", "2"]
        with pytest.raises(ConfigError, match="too small for the data set's 2 classes"):
            class_names(dataset, 1)

    def test_a_damaged_image_is_named(self, tar, caplog):
        with tarfile.open(tar) as file:
            member = file.getmembers()[1]
        contents = bytearray(tar.read_bytes())
        contents[member.offset_data : member.offset_data + 50] = bytes(50)
        tar.write_bytes(contents)
        dataset = dataset_of(tar)
        assert [dataset[i][1] == SKIPPED for i in range(4)].count(True) == 1
        assert f"{tar}:{member.name}" in skipped(caplog)[0]

    def test_a_truncated_file_is_named_wherever_it_ends(self, tar):
        contents = tar.read_bytes()
        with tarfile.open(tar) as file:
            last = file.getmembers()[-1]
        end = last.offset_data + last.size
        for length in [0, 100, *range(512, end, 512), end]:
            tar.write_bytes(contents[:length])
            with pytest.raises(ConfigError, match=r"val\.tar cannot be read as a data set: ."):
                dataset_of(tar)

    @pytest.mark.parametrize(
        ("how", "message"),
        [
            ("gz", "it is compressed by gzip"),
            ("bz2", "it is compressed by bzip2"),
            ("xz", "it is compressed by xz"),
            ("zip", "it is a zip file"),
            ("text", "invalid header"),
            ("empty", "empty file"),
        ],
    )
    def test_a_file_that_is_no_plain_tar_is_called_what_it_is(self, digits, tmp_path, how, message):
        path = tmp_path / "val.tar"
        if how == "zip":
            shutil.make_archive(str(path), "zip", digits, "val")
            Path(f"{path}.zip").rename(path)
        elif how in ("text", "empty"):
            path.write_text("no tar " * 500 * (how == "text"))
        else:
            with tarfile.open(path, f"w:{how}") as tar:
                tar.add(digits / "val", arcname="val")
        with pytest.raises(ConfigError, match=f"it must be a tar file without .*: {message}$"):
            dataset_of(path)

    def test_a_member_may_be_called_like_an_archive(self, digits, tmp_path):
        with tarfile.open(tmp_path / "val.tar", "w") as tar:
            for name in ("PK\x03\x04", "BZh"):
                tar.add(digits / "val" / "3", arcname=name)
        assert len(dataset_of(tmp_path / "val.tar")) == 4


class Reader:
    """Yields images, and raises an error in the place of the second."""

    def __iter__(self):
        yield Image.new("RGB", (4, 4)), 1
        yield Image.new("RGB", (1, 4000)), 1
        raise TypeError("of the decoder")

    def __len__(self):
        return 3


class TestStreams:
    @pytest.mark.parametrize("workers", [0, 1])
    def test_an_error_of_the_reader_is_one_line(self, workers):
        dataset = SkippingStream(Reader(), True, "wds/")
        dataset.transform = lambda image: torch.zeros(1)
        with pytest.raises(TooManyCorruptImages) as error:
            list(DataLoader(dataset, num_workers=workers))
        message = "data.kind=wds/: cannot read the stream: TypeError: of the decoder"
        assert str(error.value) == message

    @pytest.mark.parametrize(("is_training", "labels"), [(True, [1]), (False, [1, SKIPPED])])
    def test_an_image_that_resizing_would_blow_up_is_left_out(self, is_training, labels):
        dataset = SkippingStream(Reader(), is_training, "wds/")
        dataset.transform = lambda image: image
        images = iter(dataset)
        assert [next(images)[1] for _ in labels] == labels
        with pytest.raises(TooManyCorruptImages):
            next(images)

    def test_streams_are_built_to_skip(self, monkeypatch):
        stream = IterableImageDataset(None, reader=Reader())
        monkeypatch.setattr(datasets_module, "create_dataset", lambda *args, **kwargs: stream)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
        dataset = build_dataset(Data(kind="wds/", root="."), "val", False, 8)
        assert isinstance(dataset, SkippingStream)
        assert len(dataset) == 3


def test_streams_of_bytes_are_read(root):
    """As the reader of hfds/ has them, whose images may have no path."""

    class Bytes:
        def __init__(self):
            good = io.BytesIO(first(root, "val", 3).read_bytes())
            self.streams = [good, io.BytesIO(b"no image")]

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return self.streams[index], index

        def filename(self, index, absolute):
            return None

    dataset = datasets_module.SkippingImageDataset(Bytes(), False, 5)
    dataset.transform = lambda image: image
    assert [dataset[i][1] for i in range(2)] == [0, SKIPPED]


class Numbers:
    """A stream of plain images, whose red value and label is their number."""

    def __init__(self, count: int, length: int | None = None):
        self.count, self.length = count, count if length is None else length

    def __iter__(self):
        return ((Image.new("RGB", (8, 8), (i, 0, 0)), i % 3) for i in range(self.count))

    def __len__(self):
        return self.length


class TestStreamsToTheirEnd:
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

    def test_the_readers_of_timm_do_not_share_evaluation_images_out(self, monkeypatch):
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
    def test_an_image_that_cannot_be_converted_is_left_out(self, is_training, labels):
        images = (Image.new("RGB", (8, 8)), Image.new("F", (8, 8)), Image.new("L", (8, 8)))
        dataset = SkippingStream(zip(images, (1, 0, 2), strict=True), is_training, "wds/")
        dataset.transform = np.asarray
        assert [label for _, label in dataset] == labels

    @pytest.mark.parametrize("label", [-1, None, "cat", (1, 2)])
    def test_an_image_without_label_is_one_line(self, label):
        dataset = SkippingStream([(Image.new("RGB", (8, 8)), label)], False, "hfids/")
        with pytest.raises(ValueError, match=re.escape(f"from 0 on, got {label!r}: the split")):
            next(iter(dataset))

    @pytest.fixture
    def stream(self, config, monkeypatch):
        """Builds a Trainer whose training images are a stream."""

        def build(reader, **changes) -> Trainer:
            whole = state.build_dataset

            def build_dataset(data, split, is_training, batch_size):
                if is_training:
                    return SkippingStream(reader, True, "wds/")
                return whole(data, split, is_training, batch_size)

            monkeypatch.setattr(state, "build_dataset", build_dataset)
            return Trainer(config(batch_size=4, **changes), CPU)

        return build

    def test_a_stream_that_ends_early_is_counted(self, stream, caplog):
        trainer = stream(Numbers(10, length=20))
        trainer.train_epoch()
        assert (trainer.update, trainer.updates_per_epoch) == (2, 5)
        assert "epoch 1: the training images ended after 2 of 5 updates" in caplog.text

    def test_all_processes_end_with_the_first(self, stream, monkeypatch):
        trainer = stream(Numbers(20))
        asked = []

        def all_agree(yes, device):
            asked.append(yes)
            return len(asked) < 3

        monkeypatch.setattr(trainer, "train_update", lambda batches: 1.0)
        monkeypatch.setattr(engine, "all_agree", all_agree)
        trainer.train_epoch()
        assert (asked, trainer.update) == ([True, True, True], 2)

    def test_a_stream_without_images_is_one_line(self, stream):
        with pytest.raises(TooManyCorruptImages, match="ended before the first update"):
            stream(Numbers(0, length=20)).train_epoch()

    @pytest.mark.parametrize(
        ("length", "message"),
        [(0, "data.kind= must tell the number of training images"), (3, "fewer than the 4 of one")],
    )
    def test_a_stream_of_unknown_or_little_length_is_one_line(self, stream, length, message):
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
        assert "predictions.png is not drawn: the stream is gone" in caplog.text
        assert (trainer.output / "curves.png").exists()
