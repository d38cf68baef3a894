from pathlib import Path, PurePosixPath

import pytest

from flash_internimage.checkpoints import read_zoo
from flash_internimage.configs import configs_root, find_config, list_configs

ROOT = Path(__file__).parents[2]
MASK_RCNN = "mask_rcnn_flash_internimage_t_fpn_1x_coco"


def test_all_configs_of_the_repository_are_listed():
    configs = ROOT / "configs"
    files = [path for path in configs.rglob("*") if path.suffix in (".py", ".yaml")]
    names = [path.relative_to(configs) for path in files if "_base_" not in path.parts]
    assert list_configs() == sorted(name.as_posix() for name in names)
    assert configs_root().samefile(ROOT) or (configs_root() / "configs").samefile(configs)


def test_list_of_configs_is_filtered_by_a_wildcard():
    detectors = [name for name in list_configs() if name.startswith("detection/")]
    assert list_configs("detection/*") == detectors
    assert list_configs("nothing*") == []


def test_names_of_shipped_configs_are_unambiguous():
    stems = [PurePosixPath(name).stem for name in list_configs()]
    assert len(stems) == len(set(stems))


@pytest.mark.parametrize(
    "name",
    [
        MASK_RCNN,
        f"{MASK_RCNN}.py",
        f"detection/{MASK_RCNN}",
        f"detection/{MASK_RCNN}.py",
        f"configs/detection/{MASK_RCNN}.py",
        f"flash_internimage::{MASK_RCNN}",
        f"flash_internimage::detection/{MASK_RCNN}.py",
    ],
)
def test_shipped_configs_are_found_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = find_config(name)
    assert path.samefile(ROOT / "configs" / "detection" / f"{MASK_RCNN}.py")
    assert path.is_absolute()


def test_names_with_dots_and_base_files_are_found():
    assert find_config("flash_internimage_tiny_in1k_224").suffix == ".yaml"
    base = find_config("flash_internimage::detection/_base_/models/dino.py")
    assert base.samefile(ROOT / "configs" / "detection" / "_base_" / "models" / "dino.py")


def test_existing_files_are_returned_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / f"{MASK_RCNN}.py"
    own.write_text("a = 1\n")
    assert find_config(own) == own
    assert find_config(f"{MASK_RCNN}.py") == Path(f"{MASK_RCNN}.py")
    assert find_config(f"flash_internimage::{MASK_RCNN}.py") != Path(f"{MASK_RCNN}.py")


def test_unknown_names_suggest_similar_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"config not found: mask_rcn\w+; .*{MASK_RCNN}"):
        find_config("mask_rcn_flash_internimage_t_fpn_1x_coco")
    with pytest.raises(FileNotFoundError, match=r"config not found: \.\./x\.py$"):
        find_config("../x.py")
    with pytest.raises(FileNotFoundError, match=r"config not found: flash_internimage::t$"):
        find_config("flash_internimage::t")  # a file in _base_ has this name


@pytest.mark.parametrize("name", ["", "folder.py"])
def test_a_folder_or_no_name_is_an_error(name, tmp_path, monkeypatch):
    (tmp_path / "folder.py").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"config must be a file or .*, got '{name}'"):
        find_config(name)


def test_prefix_of_another_package_is_an_error():
    with pytest.raises(ValueError, match=r"begin with flash_internimage::, got mmdet::a/b\.py"):
        find_config("mmdet::a/b.py")


def test_released_models_never_use_configs_of_the_current_folder(tmp_path, monkeypatch):
    entry = read_zoo()[MASK_RCNN]
    own = tmp_path / entry.config
    own.parent.mkdir(parents=True)
    own.write_text("a = 1\n")
    monkeypatch.chdir(tmp_path)
    assert find_config(entry.config) == Path(entry.config)
    assert entry.config_path.samefile(ROOT / entry.config)
    with pytest.raises(ValueError, match="config must be set for classification, got None"):
        read_zoo()["flash_internimage_large.in22k_384"].config_path  # noqa: B018
