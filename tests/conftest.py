"""Markers and fixtures shared by all tests."""

import gc
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import fast_configs  # noqa: F401

MARKERS = {
    "detection": "mm",
    "flash_internimage/analysis/openmmlab": "mm",
    "flash_internimage/cli/test_complexity.py": "mm",
    "flash_internimage/cli/test_demo_scenes.py": "mm",
    "flash_internimage/cli/test_export.py": "mm",
    "flash_internimage/cli/test_predict.py": "mm",
    "flash_internimage/cli/test_zoo.py": "mm",
    "flash_internimage/complexity": "mm",
    "flash_internimage/export/test_formats.py": "mm",
    "flash_internimage/export/test_models.py": "mm",
    "flash_internimage/export/test_onnx.py": "mm",
    "flash_internimage/inference/test_docs.py": "mm",
    "flash_internimage/inference/test_openmmlab.py": "mm",
    "flash_internimage/openmmlab": "mm",
    "flash_internimage/own_data/openmmlab": "mm",
    "gpu": "gpu",
    "segmentation": "mm",
    "tools/test_zoo_entries.py": "mm",
}

DRAWING = (
    "flash_internimage.classification.report",
    "flash_internimage.openmmlab.engine.hooks.curves",
)

EARLY = (
    "segmentation/test_train.py",
    "detection/test_train.py",
    "ops_dcnv4/test_triton.py",
    "tools/test_gpu_check.py",
)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark tests by their folder or module."""
    path = item.path.relative_to(Path(__file__).parent)
    for part, marker in MARKERS.items():
        if path.is_relative_to(part):
            item.add_marker(marker)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest of the last modules, for which one process would have to wait."""
    root = Path(__file__).parent
    items.sort(key=lambda item: not str(item.path.relative_to(root)).startswith(EARLY))


def pytest_collection_finish() -> None:
    """Exempt imported modules from garbage collection, which mmengine triggers often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)  # tracing creates many objects


@pytest.fixture(autouse=True)
def seed(request) -> int:
    """Seed every test with 0, or with the seed that shuffled the tests."""
    seed = request.config.getoption("randomly_seed", 0)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return seed


@pytest.fixture(scope="session", autouse=True)
def own_compile_cache(tmp_path_factory) -> Iterator[None]:
    """Give this run its own torch.compile cache, as killed processes leave damaged files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(autouse=True)
def no_pause_between_epochs(monkeypatch) -> None:
    """Skip the two seconds that mmengine's iteration-based loop waits before each epoch."""
    if loops := sys.modules.get("mmengine.runner.loops"):
        monkeypatch.setattr(loops, "time", SimpleNamespace(sleep=lambda seconds: None))


def save_one_pixel(figure, file, **_) -> None:
    """Write a picture without drawing a figure."""
    from PIL import Image

    Image.new("RGB", (1, 1)).save(file, "png")


@pytest.fixture(autouse=True)
def undrawn_curves(request, monkeypatch) -> None:
    """Do not draw the results of each run, for half a second, except in tests marked `curves`."""
    if request.node.get_closest_marker("curves"):
        return
    for name in DRAWING:
        if module := sys.modules.get(name):
            undrawn = type("Undrawn", (module.Figure,), {"savefig": save_one_pixel})
            monkeypatch.setattr(module, "Figure", undrawn)
    if engine := sys.modules.get("flash_internimage.classification.engine"):
        monkeypatch.setattr(engine, "save_predictions", lambda *args: save_one_pixel(None, args[4]))


@pytest.fixture(autouse=True)
def no_visualizers_of_other_tests() -> None:
    """Forget mmengine's visualizers, which keep the folder of the first run of a process."""
    if visualization := sys.modules.get("mmengine.visualization"):
        kinds = [visualization.Visualizer]
        for kind in kinds:
            kinds += kind.__subclasses__()
            kind._instance_dict.clear()


@pytest.fixture(scope="session")
def assert_near():
    """Assert that tensors agree, with a tolerance relative to the largest expected value."""

    def check(actual: Tensor, expected: Tensor, tolerance: float) -> None:
        largest = expected.abs().max().item() if expected.numel() else 0.0
        actual = actual.detach().to(expected.dtype)
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * largest)

    return check


@pytest.fixture(scope="session")
def device() -> str:
    """Device of the operators, overridden in tests/gpu."""
    return "cpu"


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Sum in a fixed order on every device, and fill uninitialized memory with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def one_thread(monkeypatch) -> Iterator[None]:
    """Use one thread: tiny tensors need no more, and results depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def restore_scope() -> Iterator[None]:
    """Clear mmengine's default scope, which runners and earlier fixtures set for the process."""
    from mmengine.registry import DefaultScope

    DefaultScope._instance_dict.clear()
    yield
    DefaultScope._instance_dict.clear()


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fails(write_config: Callable[..., Path], tmp_path: Path, monkeypatch) -> Callable[..., None]:
    """Assert that training a detector or segmentor raises an error before it starts."""
    from mmengine.runner import Runner

    from tests.runs import train

    def check(error: type[Exception], message: str, settings: str = "", **kwargs) -> None:
        config = write_config(tmp_path / "wrong.py", settings=settings, **kwargs)
        monkeypatch.setattr(Runner, "save_checkpoint", pytest.fail)
        with pytest.raises(error, match=message):
            train(config, "--work-dir", tmp_path / "run")
        assert not list((tmp_path / "run").glob("*/vis_data/scalars.json"))

    return check
