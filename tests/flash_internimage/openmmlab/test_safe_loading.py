"""Test that entries of OpenMMLab's registries are replaced only while safe loading is enabled."""

import mmdet.registry
import mmseg.registry
import pytest
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets.transforms import InferencerLoader
from mmdet.evaluation import CocoMetric
from mmengine.registry import Registry
from mmengine.runner import CheckpointLoader

import flash_internimage.openmmlab.detection
import flash_internimage.openmmlab.segmentation  # noqa: F401  registers its overrides
from flash_internimage.openmmlab import enable_safe_loading, safe_loading
from flash_internimage.openmmlab.datasets.transforms import LoadCheckedArray, LoadCheckedImage
from flash_internimage.openmmlab.detection import CheckedPycocotoolsMetric
from tests import processes

SNAPSHOT = """
import importlib, sys
import flash_internimage_startup

flash_internimage_startup.install()  # mmdet.engine needs operators of mmcv, compiled or not.
import mmdet, mmengine, mmseg
import mmdet.apis, mmseg.apis, mmengine.registry, mmengine.runner
import mmdet.engine, mmdet.evaluation, mmseg.engine, mmseg.evaluation
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.fileio.backends import backends, prefix_to_backends
from mmengine.registry import Registry

def snapshot():
    entries = {}
    for library in ("mmengine", "mmdet", "mmseg"):
        registries = vars(importlib.import_module(f"{library}.registry"))
        for name, registry in registries.items():
            if isinstance(registry, Registry):
                keys = {*registry.module_dict, *getattr(registry.parent, "module_dict", ())}
                entries |= {(library, name, key): registry.get(key) for key in keys}
    schemes = mmengine.runner.CheckpointLoader._schemes
    for kind, table in (
        ("schemes", schemes),
        ("backends", backends),
        ("prefix", prefix_to_backends),
        ("packages", MODULE2PACKAGE),
    ):
        entries |= {(kind, key): value for key, value in table.items()}
    entries["excepthook"] = sys.excepthook
    return entries

before = snapshot()
import flash_internimage.openmmlab.MODULE
after = snapshot()
changed = [key for key in before if before[key] is not after.get(key)]
assert len(before) > 1000 and not changed, changed
assert any(key not in before for key in after)
assert ("packages", "flash_internimage") in after
"""


@pytest.mark.parametrize("module", ["detection", "segmentation", "programs"])
def test_importing_replaces_no_entries(module):
    program = SNAPSHOT.replace(".MODULE", f".{module}")
    processes.run("-c", program).checked()


def test_detection_does_not_need_mmseg_and_prints_nothing():
    program = """
import sys
sys.modules["mmseg"] = None
import flash_internimage.openmmlab.detection
"""
    assert not processes.run("-c", program).checked().stdout


def current_entries() -> list:
    schemes = CheckpointLoader._schemes
    transforms = [library.registry.TRANSFORMS for library in (mmdet, mmseg)]
    names = "LoadImageFromFile", "LoadImageFromNDArray", "InferencerLoader"
    loaders = [registry.get(name) for registry in transforms for name in names]
    metrics = [mmdet.registry.METRICS.get(name) for name in ("CocoMetric", "FasterCocoMetric")]
    return [*schemes.items(), *loaders, *metrics]


def test_safe_loading_is_enabled_in_a_block_that_may_be_nested():
    before = current_entries()
    with safe_loading.safe_loading():
        within = current_entries()
        assert LoadCheckedImage in within
        assert LoadCheckedArray in within
        assert CheckedPycocotoolsMetric in within
        assert not {LoadImageFromFile, InferencerLoader, CocoMetric} & {*within}
        with pytest.raises(KeyError), safe_loading.safe_loading():
            raise KeyError
        assert current_entries() == within
    assert current_entries() == before


def test_enable_safe_loading_applies_to_the_process():
    before = current_entries()
    try:
        enable_safe_loading()
        with safe_loading.safe_loading():
            pass
        assert CheckedPycocotoolsMetric in current_entries()
    finally:
        safe_loading._process.close()
    assert current_entries() == before


def test_overrides_registered_later_are_used_at_once(monkeypatch):
    monkeypatch.setattr(safe_loading, "_overrides", [*safe_loading._overrides])
    registry = Registry("kind")
    registry.register_module("Existing", module=LoadImageFromFile)
    with safe_loading.safe_loading():
        safe_loading.register_override(registry, "Existing", LoadCheckedImage)
        assert registry.get("Existing") is LoadCheckedImage
    assert registry.get("Existing") is LoadImageFromFile


def test_a_runner_enables_safe_loading_while_it_runs(runner):
    before = current_entries()
    r = runner(train_cfg={"by_epoch": True, "max_epochs": 0})
    assert current_entries() == before
    seen = []
    r.call_hook = lambda *args, **kwargs: seen.extend(current_entries())
    r.train()
    assert CheckedPycocotoolsMetric in seen
    assert current_entries() == before
