"""Tests of unreadable images, loops of symbolic links, and damaged tar files."""

import io
import os
import shutil
import tarfile
import traceback
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
from PIL import Image, ImageFile

from flash_internimage.classification.config import ConfigError, Data
from flash_internimage.classification.data import (
    SKIPPED,
    TooManyCorruptImages,
    build_dataset,
    class_names,
    train_loader,
    val_loader,
)
from flash_internimage.classification.data import datasets as datasets_module
from tests.classification.helpers import CPU


@pytest.fixture
def root(digits, tmp_path):
    """Return a copy of the digits that tests can damage."""
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
    @pytest.mark.slow
    @pytest.mark.parametrize("workers", [0, 2])
    def test_a_file_is_counted_and_logged_only_once(self, config, root, caplog, workers):
        first(root, "train", 3).write_text("no image")
        cfg = config(data={"root": str(root), "workers": workers, "max_corrupt": 1})
        dataset = build_dataset(cfg.data, "train", True, cfg.batch_size)
        loader = train_loader(dataset, cfg, CPU, 0, 1)
        for _ in range(3):
            assert sum(len(labels) for _, labels in loader) == 60
        assert dataset.corrupt == 1
        if not workers:  # Workers log in their own processes.
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

    def test_the_limit_applies_to_all_workers_together(self, root):
        for label in (1, 8):
            first(root, "val", label).write_text("no image")
        data = Data(root=str(root), image_size=32, workers=2, max_corrupt=1)
        dataset = build_dataset(data, "val", False, 2)
        with pytest.raises(TooManyCorruptImages) as error:
            list(val_loader(dataset, data, 2, CPU))
        traceback.clear_frames(error.tb)  # ends the workers now; a garbage collection waits 10 s
        message = str(error.value)
        assert message.startswith("found 2 unreadable images, more than data.max_corrupt=1; the")
        assert "\n" not in message

    def test_spawned_workers_count_too(self, root):
        first(root, "val", 3).write_text("no image")
        dataset = dataset_of(root)
        dataset.transform = None
        of_worker = ForkingPickler.loads(bytes(ForkingPickler.dumps(dataset)))
        of_worker.transform = lambda image: image
        assert of_worker[6][1] == SKIPPED
        assert dataset.corrupt == 1

    def test_a_split_without_readable_images_is_an_error(self, root):
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
    def test_any_error_of_a_decoder_means_an_unreadable_image(
        self, root, monkeypatch, caplog, error
    ):
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
        qoi.rename(path)  # Pillow recognizes the format by the contents.
        path.write_bytes(path.read_bytes()[:40])
        dataset = dataset_of(root)
        assert sum(dataset[i][1] == SKIPPED for i in range(len(dataset))) == 1

    def test_an_error_of_the_conversion_means_an_unreadable_image(self, root, monkeypatch, caplog):
        def convert(image, mode):
            raise ValueError("conversion not supported")

        monkeypatch.setattr(Image.Image, "convert", convert)
        assert dataset_of(root)[0][1] == SKIPPED
        assert "conversion not supported" in skipped(caplog)[0]

    def test_fifos_and_loops_of_links_do_not_block(self, root, caplog):
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

    def test_an_image_with_an_extreme_aspect_ratio_is_skipped(self, root, caplog):
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
    def test_error_names_a_loop_of_links(self, root):
        (root / "val" / "3" / "again").symlink_to(root / "val")
        with pytest.raises(ConfigError, match=r"symbolic link .*again leads back to"):
            dataset_of(root)

    def test_images_outside_of_class_folders_do_not_form_a_class(self, root):
        shutil.copy(first(root, "val", 3), root / "val" / "stray.png")
        with pytest.raises(ConfigError, match="a folder per class, got images outside"):
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

    def test_classes_are_named_after_folders(self, tar):
        dataset = dataset_of(tar)
        assert class_names(dataset, 3) == ["one", "zero", "2"]
        with pytest.raises(ConfigError, match=r"model.num_classes must be at least 2, .* got 1"):
            class_names(dataset, 1)

    def test_a_damaged_image_is_logged_by_name(self, tar, caplog):
        with tarfile.open(tar) as file:
            member = file.getmembers()[1]
        contents = bytearray(tar.read_bytes())
        contents[member.offset_data : member.offset_data + 50] = bytes(50)
        tar.write_bytes(contents)
        dataset = dataset_of(tar)
        assert [dataset[i][1] == SKIPPED for i in range(4)].count(True) == 1
        assert f"{tar}:{member.name}" in skipped(caplog)[0]

    def test_error_names_a_tar_truncated_anywhere(self, tar):
        contents = tar.read_bytes()
        with tarfile.open(tar) as file:
            last = file.getmembers()[-1]
        end = last.offset_data + last.size
        for length in [0, 100, *range(512, end, 512), end]:
            tar.write_bytes(contents[:length])
            with pytest.raises(ConfigError, match=r"val\.tar cannot be read as a dataset: ."):
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
    def test_error_names_the_format_of_files_other_than_plain_tar(
        self, digits, tmp_path, how, message
    ):
        path = tmp_path / "val.tar"
        if how == "zip":
            shutil.make_archive(str(path), "zip", digits, "val")
            Path(f"{path}.zip").rename(path)
        elif how in ("text", "empty"):
            path.write_text("no tar " * 500 * (how == "text"))
        else:
            with tarfile.open(path, f"w:{how}") as tar:
                tar.add(digits / "val", arcname="val")
        with pytest.raises(ConfigError, match=f"it must be an uncompressed tar file: {message}$"):
            dataset_of(path)

    def test_a_member_may_have_the_name_of_an_archive(self, digits, tmp_path):
        with tarfile.open(tmp_path / "val.tar", "w") as tar:
            for name in ("PK\x03\x04", "BZh"):
                tar.add(digits / "val" / "3", arcname=name)
        assert len(dataset_of(tmp_path / "val.tar")) == 4


def test_images_given_as_streams_of_bytes_are_read(root):
    """The reader of hfds/ returns streams, whose images may have no path."""

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
