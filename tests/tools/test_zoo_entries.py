"""configs/zoo.yaml beside the published figures, and all that is generated from it."""

import json
import re
from math import prod
from pathlib import Path

import pytest
import timm
import torch
import yaml
from mmengine.config import Config

from flash_internimage.classification.config import ConfigError, load_config
from tests.recipes import DATA, ROOT, read_recipes
from tools.zoo_documents import documents
from tools.zoo_entries import ZOO, Entry, find, read_zoo

ENTRIES = read_zoo()
RECIPES = {task: read_recipes(f"{task}_recipes.csv") for task in ("detection", "segmentation")}
HUB = "https://huggingface.co/OpenGVLab/DCNv4/resolve/main"
# file, resolution, top-1
CLASSIFICATION = {
    "flash_internimage_tiny.in1k": ("flash_intern_image_t_1k_224", 224, 83.6),
    "flash_internimage_small.in1k": ("flash_intern_image_s_1k_224", 224, 84.4),
    "flash_internimage_base.in1k": ("flash_intern_image_b_1k_224", 224, 84.9),
    "flash_internimage_large.in22k_ft_in1k_384": ("flash_internimage_l_22kto1k_384", 384, 88.1),
    "flash_internimage_large.in22k_384": ("flash_intern_image_l_22k_384", 384, None),
}
DENSE = [(task, name) for task, recipes in RECIPES.items() for name in recipes]


def of_task(task: str) -> dict[str, Entry]:
    return {name: entry for name, entry in ENTRIES.items() if entry.task == task}


def test_every_row_is_there_once():
    assert list(of_task("classification")) == list(CLASSIFICATION)
    assert list(of_task("detection")) == list(RECIPES["detection"])
    assert list(of_task("segmentation")) == list(RECIPES["segmentation"])
    assert len(ENTRIES) == 25
    names = re.findall(r"^\S+(?=:$)", ZOO.read_text(), re.MULTILINE)
    assert names == list(ENTRIES)  # in YAML the last of two of the same name would win


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_classification_is_as_published(name):
    file, resolution, top1 = CLASSIFICATION[name]
    entry = ENTRIES[name]
    assert entry.addresses[0] == f"{HUB}/{file}.pth"
    assert entry.resolution == resolution
    assert entry.published.known() == ({"top1": top1} if top1 else {})


def test_the_large_classifier_has_two_spellings():
    spellings = {name: entry.addresses for name, entry in ENTRIES.items() if entry.addresses[1:]}
    files = ["flash_internimage_l_22kto1k_384.pth", "flash_intern_image_l_22kto1k_384.pth"]
    addresses = [f"{HUB}/{file}" for file in files]
    assert spellings == {"flash_internimage_large.in22k_ft_in1k_384": addresses}


@pytest.mark.parametrize(("task", "name"), DENSE)
def test_detection_and_segmentation_are_as_published(task, name):
    recipe, entry = RECIPES[task][name], ENTRIES[name]
    if task == "detection":
        columns, file = {"box_ap": "box_ap", "mask_ap": "mask_ap"}, recipe["checkpoint"]
    else:
        columns = {"miou": "miou_ss", "miou_several_scales": "miou_ms"}
        file = f"{recipe['schema']}.pth"
    figures = {figure: float(recipe[key]) for figure, key in columns.items() if recipe[key]}
    assert entry.published.known() == figures
    assert entry.addresses == [f"{HUB}/{file}"]


@pytest.mark.parametrize(("task", "name"), DENSE)
def test_parameters_are_those_of_the_released_file(task, name):
    recipe, entry = RECIPES[task][name], ENTRIES[name]
    schema = DATA / "openmmlab_schemas" / f"{recipe['schema']}.json"
    buffers = re.compile(r"^ema_|\.(num_batches_tracked|running_mean|running_var)$")
    shapes = {n: s for n, s in json.loads(schema.read_text()).items() if not buffers.search(n)}
    assert entry.parameters == sum(map(prod, shapes.values()))


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_parameters_and_configs_are_timms(name):
    entry, cfg = ENTRIES[name], timm.get_pretrained_cfg(name)
    with torch.device("meta"):
        model = timm.create_model(name)
    assert entry.parameters == sum(p.numel() for p in model.parameters())
    assert cfg.url == entry.addresses[0]
    assert cfg.input_size == (3, entry.resolution, entry.resolution)
    assert cfg.num_classes == entry.classes == (21841 if name.endswith("in22k_384") else 1000)


def test_timm_has_no_others():
    assert sorted(timm.list_pretrained("flash_internimage*")) == sorted(CLASSIFICATION)


@pytest.mark.parametrize("name", ENTRIES)
def test_the_config_is_that_of_the_row(name):
    entry = ENTRIES[name]
    if entry.config is None:
        assert not entry.published.known()
    elif entry.task == "classification":
        cfg = load_config(ROOT / entry.config)
        assert name.startswith(cfg.model.name)
        assert cfg.data.image_size == entry.resolution
    else:
        assert Path(entry.config).stem == name
        cfg = Config.fromfile(ROOT / entry.config)
        short = {"detection": 800, "segmentation": cfg.get("crop_size", [None])[0]}[entry.task]
        assert entry.resolution == short
        sizes = {"T": "tiny", "S": "small", "B": "base", "L": "large"}
        assert cfg.model.backbone.arch == sizes[entry.backbone]
        weights = cfg.model.backbone.init_cfg.checkpoint
        assert ENTRIES[weights].pretraining == entry.pretraining


def test_figures_have_a_source():
    assert all(bool(entry.source) == bool(entry.published.known()) for entry in ENTRIES.values())


# What is generated


@pytest.mark.parametrize(
    "path", documents(ENTRIES), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_generated_files_are_in_step(path):
    assert path.read_text() == documents(ENTRIES)[path]


def test_another_figure_changes_table_and_metafile():
    changed = {name: entry.model_copy(deep=True) for name, entry in ENTRIES.items()}
    changed["mask_rcnn_flash_internimage_t_fpn_1x_coco"].published.box_ap = 12.3
    differ = {path.name for path, text in documents(changed).items() if text != path.read_text()}
    assert differ == {"README.md", "metafile.yml"}


def test_metafiles_lead_to_files_and_figures():
    index = yaml.safe_load((ROOT / "model-index.yml").read_text())
    models = {}
    for path in index["Import"]:
        metafile = yaml.safe_load((ROOT / path).read_text())
        models |= {model["Name"]: model for model in metafile["Models"]}
        assert all(
            (ROOT / collection["README"]).is_file() for collection in metafile["Collections"]
        )
    assert list(models) == list(ENTRIES)
    assert all((ROOT / m["Config"]).is_file() for m in models.values() if "Config" in m)
    results = models["mask_rcnn_flash_internimage_b_fpn_3x_coco"]["Results"]
    assert [(r["Task"], r["Metrics"]) for r in results] == [
        ("Object Detection", {"box AP": 50.6}),
        ("Instance Segmentation", {"mask AP": 45.4}),
    ]


# What is refused

ROW = {
    "task": "detection",
    "architecture": "DINO",
    "backbone": "T",
    "pretraining": "ImageNet-1K",
    "addresses": ["https://example.org/model.pth"],
    "resolution": 800,
    "parameters": 10,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adresses": []}, "row: unknown key 'adresses'; did you mean 'addresses'"),
        ({"published": {"box_app": 1}}, "'published.box_app'; did you mean 'published.box_ap'"),
        ({"published": {"box_ap": 101}}, "published.box_ap: .*less than or equal to 100, got 101"),
        ({"task": "detektion"}, "task: .*'detection'.*, got 'detektion'"),
        ({"addresses": []}, "addresses: .*at least 1"),
        ({"addresses": ["model.pth"]}, "addresses.0: .*got 'model.pth'"),
        ({"sha256": "abc"}, "sha256: .*got 'abc'"),
        ({"parameters": None}, "parameters: "),
    ],
)
def test_rows_that_do_not_fit_are_errors(tmp_path, change, message):
    path = tmp_path / "zoo.yaml"
    path.write_text(yaml.safe_dump({"row": ROW}))
    assert read_zoo(path)["row"].resolution == 800
    path.write_text(yaml.safe_dump({"row": ROW | change}))
    with pytest.raises(ConfigError, match=message):
        read_zoo(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("row: {}\nrow: {}", "zoo.yaml is not valid YAML: duplicate key 'row', line 2"),
        ("row: {task: a, task: b}", "zoo.yaml is not valid YAML: duplicate key 'task', line 1"),
        ("row: [", "zoo.yaml is not valid YAML: "),
        ("", "zoo.yaml must hold entries by their names, got None"),
    ],
)
def test_a_file_that_is_no_zoo_is_an_error(text, message, tmp_path):
    path = tmp_path / "zoo.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_zoo(path)


def test_a_misspelt_name_is_an_error():
    with pytest.raises(ConfigError, match=r"did you mean 'flash_internimage_tiny\.in1k'"):
        find(ENTRIES, "flash_internimage_tinny.in1k")
    with pytest.raises(ConfigError, match=r"no 'xyz', `python -m tools\.zoo list` has"):
        find(ENTRIES, "xyz")
