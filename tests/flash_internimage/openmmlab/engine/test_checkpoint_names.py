"""Test the file names and folders of checkpoints."""

import logging
import os
from types import SimpleNamespace

import pytest
from mmengine.hooks import CheckpointHook

from flash_internimage.openmmlab import AtomicCheckpointHook
from flash_internimage.openmmlab.engine.runner import checkpoint_names


@pytest.mark.parametrize(
    ("template", "name", "expected"),
    [
        ("epoch_{}.pth", "epoch_12.pth", 12),
        ("epoch_{}.pth", "epoch_012.pth", None),
        ("epoch_{}.pth", "epoch_0.pth", None),
        ("epoch_{}.pth", "epoch_-1.pth", None),
        ("epoch_{}.pth", "epoch_1_2.pth", None),
        ("epoch_{}.pth", "epoch_\u0663.pth", None),
        ("epoch_{}.pth", "my_epoch_12.pth", None),
        ("it_{:06d}.pth", "it_000012.pth", 12),
        ("it_{:06d}.pth", "it_1234567.pth", 1234567),
        ("it_{:06d}.pth", "it_12.pth", None),
        ("it_{0}.pth", "it_12.pth", 12),
        ("v2{}", "v23", 3),
        ("{}", "23", 23),
        ("a_1_{}_3.ckpt", "a_1_7_3.ckpt", 7),
    ],
)
def test_number_in_a_name(template, name, expected):
    checkpoint_names.check_checkpoint_names(None, template)
    assert checkpoint_names.checkpoint_number(template, name) == expected


@pytest.mark.parametrize(
    "template",
    [
        "last.pth",
        "{}_{}.pth",
        "{0}_{0}.pth",
        "{epoch}.pth",
        "{.a}.pth",
        "{:x}.pth",
        "{:,}.pth",
        "{:.2f}.pth",
        "{:1.1}.pth",
        "a/{}.pth",
        "../{}.pth",
        "{",
        "{}}.pth",
        "",
        3,
        ["{}"],
    ],
)
def test_invalid_templates_are_rejected(template):
    with pytest.raises(ValueError, match=r"^filename_tmpl must be a file name with one {} .*, got"):
        AtomicCheckpointHook(filename_tmpl=template)


@pytest.mark.parametrize("out_dir", ["s3://bucket/run", 3, ["a"]])
def test_folders_that_are_not_local_are_rejected(out_dir):
    with pytest.raises(ValueError, match=r"^out_dir must be a local folder or None, got"):
        AtomicCheckpointHook(out_dir=out_dir)


@pytest.mark.parametrize(
    "out_dir", [None, "saved", "{}/saved/", "{}/work/run", "{}/work", "work/run"]
)
@pytest.mark.parametrize("work_dir", ["{}/work/run", "{}/work/run/", "work/../work/run"])
def test_the_folder_equals_that_of_mmengine(out_dir, work_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    work_dir, out_dir = work_dir.format(tmp_path), out_dir and out_dir.format(tmp_path)
    hook = CheckpointHook(out_dir=out_dir)
    # mmengine's runner makes its argument absolute.
    runner = SimpleNamespace(work_dir=os.path.abspath(work_dir), logger=logging.getLogger(__name__))
    hook.before_train(runner)
    assert checkpoint_names.checkpoint_folder(work_dir, out_dir) == hook.out_dir


def test_names_that_match_the_template_come_first(tmp_path):
    for name in ("epoch_9.pth", "iter_70.pth", "m_2.ckpt", "m_10.ckpt", "m_11-1a2b3c4d.ckpt"):
        (tmp_path / name).touch()
    (tmp_path / "m_12.ckpt").mkdir()
    latest = checkpoint_names.latest_checkpoint
    assert latest(tmp_path, "m_{}.ckpt").name == "m_10.ckpt"
    assert latest(tmp_path, "n_{}.pth").name == "epoch_9.pth"
    assert latest(tmp_path, "n_{}.pth", by_epoch=False).name == "iter_70.pth"
    assert latest(tmp_path / "none") is None
