"""Tests that the zoo matches the published results, and that generated files match the zoo."""

import json
import re
from copy import deepcopy
from dataclasses import asdict
from math import prod
from pathlib import Path

import pytest
import timm
import torch
import yaml
from mmengine.config import Config
from pydantic import TypeAdapter

from flash_internimage.checkpoints.zoo import ZOO, Entry, find, read_zoo
from flash_internimage.classification.config import load_config
from tests.recipes import ROOT, published_shapes, read_recipes
from tools.zoo_documents import documents

ENTRIES = read_zoo()
RECIPES = {task: read_recipes(f"{task}_recipes.csv") for task in ("detection", "segmentation")}
HUB = "https://huggingface.co/OpenGVLab/{}/resolve/main"
REPOSITORIES = {"FlashInternImage": "DCNv4", "InternImage": "InternImage"}
# File, resolution and top-1 accuracy.
CLASSIFICATION = {
    "flash_internimage_tiny.in1k": ("flash_intern_image_t_1k_224", 224, 83.6),
    "flash_internimage_small.in1k": ("flash_intern_image_s_1k_224", 224, 84.4),
    "flash_internimage_base.in1k": ("flash_intern_image_b_1k_224", 224, 84.9),
    "flash_internimage_large.in22k_ft_in1k_384": ("flash_internimage_l_22kto1k_384", 384, 88.1),
    "flash_internimage_large.in22k_384": ("flash_intern_image_l_22k_384", 384, None),
    "internimage_tiny.in1k": ("internimage_t_1k_224", 224, 83.5),
    "internimage_small.in1k": ("internimage_s_1k_224", 224, 84.2),
    "internimage_base.in1k": ("internimage_b_1k_224", 224, 84.9),
    "internimage_large.in22k_ft_in1k_384": ("internimage_l_22kto1k_384", 384, 87.7),
    "internimage_large.in22k_384": ("internimage_l_22k_192to384", 384, None),
    "internimage_xlarge.in22k_ft_in1k_384": ("internimage_xl_22kto1k_384", 384, 88.0),
    "internimage_xlarge.in22k_384": ("internimage_xl_22k_192to384", 384, None),
    "internimage_huge.joint_in22k_ft_in1k_640": ("internimage_h_22kto1k_640", 640, 89.6),
    "internimage_huge.joint_in22k_384": ("internimage_h_jointto22k_384", 384, None),
    "internimage_giant.joint_in22k_ft_in1k_512": ("internimage_g_22kto1k_512", 512, 90.1),
    "internimage_giant.joint_in22k_384": ("internimage_g_pretrainto22k_384", 384, None),
}
SIZES = {
    "T": "tiny",
    "S": "small",
    "B": "base",
    "L": "large",
    "XL": "xlarge",
    "H": "huge",
    "G": "giant",
}
DENSE = [(task, name) for task, recipes in RECIPES.items() for name in recipes]


def entries_of_task(task: str) -> dict[str, Entry]:
    return {name: entry for name, entry in ENTRIES.items() if entry.task == task}


def hub(entry: Entry) -> str:
    return HUB.format(REPOSITORIES[entry.family])


def test_every_row_occurs_once():
    assert list(entries_of_task("classification")) == list(CLASSIFICATION)
    assert list(entries_of_task("detection")) == list(RECIPES["detection"])
    assert list(entries_of_task("segmentation")) == list(RECIPES["segmentation"])
    names = re.findall(r"^\S+(?=:$)", ZOO.read_text(), re.MULTILINE)
    assert names == list(ENTRIES)  # YAML silently drops duplicate keys.


def test_values_have_the_declared_types():
    rows = json.dumps({name: asdict(entry) for name, entry in ENTRIES.items()})
    TypeAdapter(dict[str, Entry]).validate_json(rows, strict=True)


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_classification_matches_the_published_figures(name):
    file, resolution, top1 = CLASSIFICATION[name]
    entry = ENTRIES[name]
    assert entry.addresses[0] == f"{hub(entry)}/{file}.pth"
    assert entry.architecture == entry.family
    assert entry.resolution == resolution
    assert entry.published == ({"top1": top1} if top1 else {})


def test_the_large_classifier_has_two_spellings():
    spellings = {name: entry.addresses for name, entry in ENTRIES.items() if entry.addresses[1:]}
    files = ["flash_internimage_l_22kto1k_384.pth", "flash_intern_image_l_22kto1k_384.pth"]
    name = "flash_internimage_large.in22k_ft_in1k_384"
    assert spellings == {name: [f"{hub(ENTRIES[name])}/{file}" for file in files]}


@pytest.mark.parametrize(("task", "name"), DENSE)
def test_detection_and_segmentation_match_the_published_figures(task, name):
    recipe, entry = RECIPES[task][name], ENTRIES[name]
    if task == "detection":
        columns = {"box_ap": "box_ap", "mask_ap": "mask_ap"}
    else:
        columns = {"miou": "miou_ss", "miou_several_scales": "miou_ms"}
    figures = {figure: float(recipe[key]) for figure, key in columns.items() if recipe[key]}
    assert entry.published == figures
    assert entry.addresses == [f"{hub(entry)}/{recipe['checkpoint']}"]


@pytest.mark.parametrize(("task", "name"), DENSE)
def test_parameters_match_the_released_file(task, name):
    recipe, entry = RECIPES[task][name], ENTRIES[name]
    buffers = re.compile(r"^ema_|\.(num_batches_tracked|running_mean|running_var)$")
    shapes = {n: s for n, s in published_shapes(recipe).items() if not buffers.search(n)}
    assert entry.parameters == sum(map(prod, shapes.values()))
    if rounded := recipe["published_parameters"]:  # by the authors of InternImage
        millions, billions = entry.parameters / 1e6, entry.parameters / 1e9
        assert rounded in (f"{millions:.0f}M", f"{billions:.2f}B")


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_timm_registers_the_classifiers(name):
    entry, cfg = ENTRIES[name], timm.get_pretrained_cfg(name)
    with torch.device("meta"):
        model = timm.create_model(name)
    assert entry.parameters == sum(p.numel() for p in model.parameters())
    assert cfg.url == entry.addresses[0]
    assert cfg.input_size == (3, entry.resolution, entry.resolution)
    assert cfg.num_classes == entry.classes == (21841 if name.endswith("in22k_384") else 1000)
    assert cfg.origin_url == f"https://github.com/OpenGVLab/{REPOSITORIES[entry.family]}"
    assert name.startswith("flash_") == (entry.family == "FlashInternImage")


@pytest.mark.parametrize("name", ENTRIES)
def test_the_config_matches_the_row(name):
    entry = ENTRIES[name]
    if entry.config is None:
        assert not entry.published
    elif entry.task == "classification":
        cfg = load_config(ROOT / entry.config)
        assert name.startswith(cfg.model.name)
        assert cfg.model.name.endswith(f"internimage_{SIZES[entry.backbone]}")
        assert cfg.data.image_size == entry.resolution
    else:
        assert Path(entry.config).stem == name
        cfg = Config.fromfile(ROOT / entry.config)
        short = {"detection": 800, "segmentation": cfg.get("crop_size", [None])[0]}[entry.task]
        assert entry.resolution == short
        assert cfg.model.backbone.arch == SIZES[entry.backbone]
        assert ("_flash_" in name) == (entry.family == "FlashInternImage")
        weights = cfg.model.backbone.init_cfg.checkpoint
        assert ENTRIES[weights].pretraining == entry.pretraining


def test_figures_have_a_source():
    assert all(bool(entry.source) == bool(entry.published) for entry in ENTRIES.values())


def test_a_misspelt_name_is_an_error():
    with pytest.raises(ValueError, match=r"did you mean 'flash_internimage_tiny\.in1k'"):
        find(ENTRIES, "flash_internimage_tinny.in1k")
    with pytest.raises(
        ValueError, match=r"no checkpoint 'xyz' in the zoo; see `flash-internimage zoo list`"
    ):
        find(ENTRIES, "xyz")


# Generated files


@pytest.mark.parametrize(
    "path", documents(ENTRIES), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_generated_files_are_up_to_date(path):
    assert path.read_text() == documents(ENTRIES)[path]


def test_a_changed_figure_updates_table_and_metafile():
    changed = deepcopy(ENTRIES)
    changed["mask_rcnn_flash_internimage_t_fpn_1x_coco"].published["box_ap"] = 12.3
    differ = {path.name for path, text in documents(changed).items() if text != path.read_text()}
    assert differ == {"README.md", "metafile.yml"}


def test_metafiles_refer_to_existing_files_and_figures():
    index = yaml.safe_load((ROOT / "model-index.yml").read_text())
    models = {}
    for path in index["Import"]:
        metafile = yaml.safe_load((ROOT / path).read_text())
        models |= {model["Name"]: model for model in metafile["Models"]}
        assert all(
            (ROOT / collection["README"]).is_file() for collection in metafile["Collections"]
        )
    assert list(models) == [name for name, entry in ENTRIES.items() if entry.config]
    assert all((ROOT / model["Config"]).is_file() for model in models.values())
    results = models["mask_rcnn_flash_internimage_b_fpn_3x_coco"]["Results"]
    assert [(r["Task"], r["Metrics"]) for r in results] == [
        ("Object Detection", {"box AP": 50.6}),
        ("Instance Segmentation", {"mask AP": 45.4}),
    ]
