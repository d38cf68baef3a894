import gzip
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import accuracy, record
from ops_dcnv4 import DCNv4, dcnv4

SETS = (("train", 70), ("t10k", 40))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write random images in the format of Fashion-MNIST; a pixel of each image is its label."""
    folder, numbers = tmp_path_factory.mktemp("fashion"), np.random.default_rng(0)
    for name, count in SETS:
        labels = numbers.integers(10, size=count, dtype=np.uint8)
        images = numbers.integers(200, size=(count, 28, 28), dtype=np.uint8)
        images[:, 14, 14] = labels
        for kind, header, array in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
            content = gzip.compress(bytes(header) + array.tobytes())
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(content)
    return folder


def test_images_and_labels_are_read_in_order(folder):
    for split, count in zip(accuracy.SPLITS, (70, 40), strict=True):
        images, labels = accuracy.read_split(folder, split)
        assert (images.shape, labels.dtype) == ((count, 1, 28, 28), torch.int64)
        assert images.dtype == torch.float32
        assert 0.5 < images.max() < 1
        torch.testing.assert_close((images[:, 0, 14, 14] * 255).round().long(), labels)


def test_training_images_are_shifted_and_flipped_copies():
    images = torch.rand(64, 1, 28, 28)
    batch = accuracy.augment(images, torch.Generator().manual_seed(0))
    places = set()
    for image, shown in zip(images, batch, strict=True):
        matches = [
            (y, x, flipped)
            for y in range(5)
            for x in range(5)
            for flipped in (False, True)
            if torch.equal(F.pad(image.flip(2) if flipped else image, (x, 4 - x, y, 4 - y)), shown)
        ]
        assert len(matches) == 1
        places.add(matches[0])
    assert len(places) > 20


def test_weights_of_the_convolutions_sum_to_one():
    model = accuracy.convnext_softmax()
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(layers) == 6
    for layer in layers:
        assert layer.weight.shape[2:] == (7, 7)
        sums = layer.weight.sum(dim=(2, 3))
        torch.testing.assert_close(sums, torch.ones_like(sums))
        assert (layer.weight > 0).all()


def test_softmax_replaces_the_modulation_of_dcnv4():
    torch.manual_seed(0)
    model = accuracy.convnext_dcnv4_softmax()
    layer = next(m for m in model.modules() if isinstance(m, DCNv4))
    linear, _ = layer.offset_mask
    nn.init.normal_(linear.weight)
    x = torch.randn(2, 5, 5, layer.channels)
    groups = linear(x)[..., : 27 * layer.group].unflatten(3, (layer.group, 27))
    packed = torch.cat((groups[..., :18], groups[..., 18:].softmax(-1)), dim=4).flatten(3)
    packed = F.pad(packed, (0, linear.out_features - packed.shape[3]))
    torch.testing.assert_close(layer.apply_to_image(x), dcnv4(x, packed, *layer.window()))


def test_networks_have_about_as_many_multiply_adds():
    sizes = {name: accuracy.complexity(build()) for name, build in accuracy.MODELS.items()}
    multiply_adds = [size["multiply_adds"] for size in sizes.values()]
    assert max(multiply_adds) < 1.35 * min(multiply_adds)
    assert sizes["convnext"] == sizes["convnext_softmax"]
    assert sizes["convnext_dcnv4"] == sizes["convnext_dcnv4_softmax"]


def test_accuracy_counts_all_images(monkeypatch):
    monkeypatch.setattr(accuracy, "TEST_BATCH", 3)

    class Constant(nn.Linear):
        def forward(self, images):
            assert images.shape[1:] == (1, 64, 64)
            return torch.tensor([0.0, 1.0]).expand(len(images), 2)

    data = torch.rand(7, 1, 28, 28), torch.tensor([0, 1, 1, 0, 1, 1, 1])
    assert accuracy.accuracy(Constant(1, 1), data) == pytest.approx(500 / 7)


def test_interrupted_benchmark_continues(folder, tmp_path, monkeypatch, capsys):
    options = ["--data", str(folder), "--output", str(tmp_path), "--threads", "1"]
    options += ["--epochs", "1", "--train-images", "64", "--batch-size", "32"]
    accuracy.main([*options, "--models", "convnext", "--seeds", "0"])
    (file,) = tmp_path.glob("accuracy_*.json")
    first = json.loads(file.read_text())["results"]
    trained = []

    def train(model, data, seed, epochs, batch_size):
        trained.append((type(model).__name__, seed, len(data[1]), epochs, batch_size))
        return [1.0]

    monkeypatch.setattr(accuracy, "train", train)
    accuracy.main([*options, "--models", "convnext", "vit", "--seeds", "0", "1", "0"])
    assert trained == [
        ("VisionTransformer", 0, 64, 1, 32),
        ("ConvNeXt", 1, 64, 1, 32),
        ("VisionTransformer", 1, 64, 1, 32),
    ]
    results = json.loads(file.read_text())["results"]
    assert results[:1] == first
    assert 1 < first[0]["losses"][0] < 4
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    mean = sum(r["top1"] for r in results if r["model"] == "convnext") / 2
    assert f"{mean:9.2f}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has results with other settings: choose another --out"):
        accuracy.main([*options, "--epochs", "2"])


def test_equal_seeds_give_equal_runs(folder):
    data = accuracy.read_split(folder, "train")

    def run(seed):
        torch.manual_seed(seed)
        return accuracy.train(accuracy.convnext_dcnv4(), data, seed, epochs=1, batch_size=32)

    assert run(0) == run(0) != run(1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--train-images", "99"],
            "--train-images: must be from 64 (the batch size) to 70, got 99",
        ),
        (["--train-images", "8"], "--train-images: must be from 64 (the batch size) to 70, got 8"),
        (["--seeds", "-1"], "argument --seeds: must be an integer from 0 to 2^63 - 1, got '-1'"),
        (["--seeds", f"{2**63}"], f"must be an integer from 0 to 2^63 - 1, got '{2**63}'"),
        (["--output", __file__], f"argument --output: the folder {__file__} cannot be written: "),
        (["--models", "resnet"], "argument --models: invalid choice: 'resnet'"),
    ],
)
def test_one_error_names_the_bad_argument(options, expected, folder, capsys):
    with pytest.raises(SystemExit, match="2"):
        accuracy.main(["--data", str(folder), *options])
    assert expected in capsys.readouterr().err.splitlines()[-1]


BROKEN = [
    None,
    b"no gzip",
    b"\x1f\x8b\x08" + bytes(7) + b"\xff" * 20,
    gzip.compress(bytes(16 + 100)),
]


@pytest.mark.parametrize("content", BROKEN)
def test_damaged_data_is_one_error(content, folder, tmp_path, capsys):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    broken = tmp_path / "t10k-images-idx3-ubyte.gz"
    broken.unlink() if content is None else broken.write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        accuracy.main(["--data", str(tmp_path)])
    error = capsys.readouterr().err.splitlines()[-1]
    assert "argument --data: must contain t10k-images-idx3-ubyte.gz and t10k-labels-idx1" in error


@pytest.mark.parametrize("labels", [b"", b"\x0a"])
def test_other_labels_are_one_error(labels, folder, tmp_path, capsys):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for name, content in (
        ("images-idx3", bytes(16 + 784 * len(labels))),
        ("labels-idx1", bytes(8)),
    ):
        file = tmp_path / f"t10k-{name}-ubyte.gz"
        file.write_bytes(gzip.compress(content + labels * (name == "labels-idx1")))
    with pytest.raises(SystemExit, match="2"):
        accuracy.main(["--data", str(tmp_path)])
    assert "labels must be from 0 to 9" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_other_files_are_not_continued(content, tmp_path):
    run = record.start("accuracy", torch.device("cpu"), {})
    record.results_file(run, tmp_path).write_text(content)
    with pytest.raises(SystemExit, match=r"\.json is not a result of this benchmark: choose anoth"):
        accuracy.read_finished(run, tmp_path)
