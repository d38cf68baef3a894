"""Test the configs and small copies of their models on images of several sizes."""

import copy
import functools
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmseg.registry import DATASETS, MODELS
from mmseg.structures import SegDataSample
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from tests import recipes
from tests.recipes import an_eighth, read_recipes

RECIPES = read_recipes("segmentation_recipes.csv")
UPERNET_T = "upernet_flash_internimage_t_512_160k_ade20k"
MASK2FORMER_L = "mask2former_flash_internimage_l_640_160k_ade20k"
RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
pytestmark = pytest.mark.usefixtures("mmseg_scope")
load_config = functools.partial(recipes.load_config, "segmentation")


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split()]


SIZES = {"1": (512, 683), "2": (50, 300)}  # height and width


@pytest.fixture(scope="module")
def ade(tmp_path_factory) -> Path:
    """Write the folders of ADE20K with a crop of a photograph and noise of two sizes."""
    root = tmp_path_factory.mktemp("ade")
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (*size, 3), np.uint8) for name, size in SIZES.items()}
    images["0"] = load_sample_image("china.jpg")[120:180, 200:281, ::-1]
    for part in ("training", "validation"):
        for folder in ("images", "annotations"):
            (root / folder / part).mkdir(parents=True)
        for name, image in images.items():
            rows = (np.arange(image.shape[0]) % 151).astype(np.uint8)  # 0 is unlabeled
            truth = np.broadcast_to(rows[:, None], image.shape[:2])
            cv2.imwrite(str(root / "images" / part / f"{name}.jpg"), image)
            cv2.imwrite(str(root / "annotations" / part / f"{name}.png"), truth)
    return root


def rescaled(size: tuple[int, int], scale: tuple[int, int]) -> tuple[int, int]:
    """Return the largest size within the long and short side of the scale."""
    factor = min(max(scale) / max(size), min(scale) / min(size))
    return tuple(int(side * factor + 0.5) for side in size)


def to_multiples(size: tuple[int, int]) -> tuple[int, int]:
    return tuple(-(-side // 32) * 32 for side in size)


@pytest.mark.parametrize(
    ("name", "image"), [*((name, "1") for name in RECIPES), (UPERNET_T, "2"), (MASK2FORMER_L, "2")]
)
def test_sizes_of_the_views(name, image, ade):
    recipe, config = RECIPES[name], load_config(name)
    short_sides = numbers(recipe["several_short_sides"])
    expected = [rescaled(SIZES[image], (4 * side, side)) for side in short_sides]
    if recipe["resize_to_multiple"] == "yes":
        expected = [to_multiples(size) for size in expected]
    data = {**config.test_dataloader.dataset, "data_root": ade}
    sample = DATASETS.build(data)[int(image)]
    views = DATASETS.build({**data, "pipeline": config.tta_pipeline})[int(image)]
    assert tuple(sample["inputs"].shape) == (3, *expected[2])
    assert [tuple(view.shape[1:]) for view in views["inputs"]] == [
        s for s in expected for _ in "lr"
    ]
    truth = torch.arange(SIZES[image][0])[:, None].expand(SIZES[image]) % 151 - 1
    truth = truth.where(truth >= 0, 255)
    for view in (sample["data_samples"], *views["data_samples"]):
        assert torch.equal(view.gt_sem_seg.data[0], truth)
        assert view.ori_shape == SIZES[image]


SMALL = {
    UPERNET_T: {
        "model.decode_head.in_channels": [32, 64, 128, 256],
        "model.decode_head.channels": 16,
        "model.auxiliary_head.in_channels": 128,
        "model.auxiliary_head.channels": 16,
    },
    "upernet_internimage_h_896_160k_ade20k": {
        "model.backbone.arch": "huge",
        "model.backbone.channels": 32,
        "model.backbone.depths": [1, 1, 2, 1],
        "model.backbone.groups": [1, 2, 4, 8],
        "model.backbone.level2_post_norm_block_ids": [0, 1],
        "model.decode_head.in_channels": [32, 64, 128, 256],
        "model.decode_head.channels": 16,
        "model.auxiliary_head.in_channels": 128,
        "model.auxiliary_head.channels": 16,
    },
    MASK2FORMER_L: {
        "model.decode_head.in_channels": [32, 64, 128, 256],
        "model.decode_head.num_queries": 10,
        "model.decode_head.pixel_decoder.encoder.num_layers": 1,
        "model.decode_head.transformer_decoder.num_layers": 2,
    },
}


def small_copy(name: str) -> tuple[Config, nn.Module]:
    torch.manual_seed(0)
    np.random.seed(0)
    config = copy.deepcopy(load_config(name))
    config.model.backbone.update(arch="nano", drop_path_rate=0.0, init_cfg=None)
    config.merge_from_dict(SMALL[name])
    config.model.data_preprocessor.size = an_eighth(config.crop_size, "crop_size")
    model = MODELS.build(copy.deepcopy(config.model))
    model.init_weights()
    return config, model


@pytest.mark.parametrize("name", SMALL)
def test_all_parameters_of_a_small_copy_receive_a_gradient(name, ade):
    # A parameter without gradient stops distributed training.
    config, model = small_copy(name)
    data = config.train_dataloader.dataset
    pipeline = an_eighth(data.pipeline)
    images = DATASETS.build({**data, "data_root": ade, "pipeline": pipeline})
    batch = model.data_preprocessor(pseudo_collate([images[0], images[1]]), training=True)
    assert batch["inputs"].shape[-2:] == config.model.data_preprocessor.size
    loss, _ = model.parse_losses(model.loss(batch["inputs"], batch["data_samples"]))
    loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


def scores_before_resizing(model: nn.Module, image: Tensor) -> Tensor:
    maps = model.extract_feat(image)
    if type(model.decode_head).__name__ == "UPerHead":
        return model.decode_head(maps)
    classes, masks = model.decode_head(maps, [SegDataSample()])
    probabilities = classes[-1].softmax(2)[:, :, :150]
    return torch.einsum("nqc,nqhw->nchw", probabilities, masks[-1].sigmoid())


def view_probabilities(
    model: nn.Module, image: np.ndarray, size: tuple[int, int], flip: bool
) -> Tensor:
    """Return the class probabilities of a resized image, at its original size."""
    mean, std = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])[..., None, None]
    view = image[:, ::-1] if flip else image
    rgb = torch.from_numpy(view[..., ::-1].transpose(2, 0, 1).copy())
    scores = scores_before_resizing(model, ((rgb - mean) / std)[None])
    scores = interpolate(scores, image.shape[:2], mode="bilinear", align_corners=False)
    scores = scores.flip(3) if flip else scores
    return interpolate(scores, size, mode="bilinear", align_corners=False)[0].softmax(0)


def resize_bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)


@pytest.mark.parametrize(
    ("name", "last_layers"),
    [(UPERNET_T, ["conv_seg"]), (MASK2FORMER_L, ["cls_embed", "mask_embed.4"])],
)
@torch.no_grad()
def test_probabilities_of_all_views_are_averaged(name, last_layers, ade):
    config, model = small_copy(name)
    for layer in last_layers:  # for distinct scores of pixels and classes
        nn.init.normal_(model.decode_head.get_submodule(layer).weight, std=0.2)
    model.eval()
    pipeline = an_eighth(config.tta_pipeline)
    data = {**config.test_dataloader.dataset, "data_root": ade, "pipeline": pipeline}
    averaging = MODELS.build({**config.tta_model, "module": model})
    sample = DATASETS.build(data)[0]
    [result] = averaging.test_step(pseudo_collate([sample]))

    image = cv2.imread(str(ade / "images" / "validation" / "0.jpg"))
    size, scale = image.shape[:2], numbers(RECIPES[name]["test_scale"])
    views = []
    for ratio in RATIOS:
        view = resize_bilinear(image, rescaled(size, [int(side * ratio) // 8 for side in scale]))
        if RECIPES[name]["resize_to_multiple"] == "yes":
            view = resize_bilinear(view, to_multiples(view.shape[:2]))
        views += [view_probabilities(model, view, size, flip) for flip in (False, True)]
    mean = torch.stack(views).mean(0)
    best, second = mean.topk(2, dim=0).values
    clear = best - second > 1e-6
    found, expected = result.pred_sem_seg.data[0], mean.argmax(0)
    assert clear.float().mean() > 0.99
    assert torch.equal(found[clear], expected[clear])
    for view in views:  # no single view determines the result
        assert (view.argmax(0) != expected).float().mean() > 0.01
    assert torch.equal(result.gt_sem_seg.data, sample["data_samples"][0].gt_sem_seg.data)
