"""No file is unpickled but by the loader that executes nothing in it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("ops_dcnv4", "flash_internimage", "classification", "detection", "segmentation", "tools")
SOURCES = sorted(path for folder in (*FOLDERS, "configs") for path in (ROOT / folder).rglob("*.py"))
# Whatever executes what a file says, or calls something that does.
UNSAFE = re.compile(
    r"""
    torch\.(load|hub\.load\w*|jit\.load|package\..*|export\.load)
    | eval | exec | __import__ | runpy\..* | yaml\.(full_|unsafe_)?load(_all)?
    | mmengine\.(config\.)?Config\.fromstring | mmengine\.model\.(weight_init\.)?PretrainedInit
    | torch\.serialization\.(load|_load|_legacy_load)
    | torch\.utils\.model_zoo\.load_url
    | torch\.distributed\.checkpoint\..*load.*
    | (pickle|_pickle|cPickle|dill|cloudpickle|marshal)\.(loads?|_?Unpickler|_loads?)
    | (joblib|numpy\.lib\.npyio|numpy\.lib\.format)\.(load|read_array)
    | (pandas|numpy)\.read_pickle | shelve\..*
    | mmengine\.(fileio\.)?load
    | mm(engine|cv)\.runner\.(checkpoint\.)?
      _?(safe_torch_load|load_checkpoint|load_state_dict|load_from).*
    | mmengine\.runner\.checkpoint\.CheckpointLoader.* | mmengine\.runner\.CheckpointLoader.*
    | (mmdet|mmseg|mmcls|mmpretrain)\.apis\.(init_\w+|inference_init|\w+Inferencer)
    | timm\.models\.(_helpers\.|_builder\.|_hub\.|helpers\.)?
      (load_(checkpoint|state_dict|pretrained|custom_pretrained)\w*|resume_checkpoint|_torch_load)
    | timm\.utils\.(model_ema\.)?ModelEma
    | (torch|pickle|_pickle|dill|mmengine|mmengine\.runner|timm\.models)\.\*
    """,
    re.VERBOSE,
)
ALLOWED = {
    "flash_internimage/openmmlab/readers.py": {  # which makes the engine read files safely, too
        "mmengine.runner.CheckpointLoader",
        "mmengine.runner.CheckpointLoader._schemes",
        "mmengine.runner.CheckpointLoader.register_scheme",
    },
    "flash_internimage/safe_load.py": {"torch.load"},  # with weights_only=True
}


def names_in(tree: ast.AST) -> Iterator[str]:
    """The full names of all that is imported or reached through an import."""
    imported: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                imported[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        attributes = []
        while isinstance(node, ast.Attribute):
            attributes.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name) and node.id not in imported and not attributes:
            yield node.id
        elif isinstance(node, ast.Name) and node.id in imported:
            yield ".".join([imported[node.id], *reversed(attributes)])


def asks_for_objects(tree: ast.AST) -> bool:
    """Whether numpy is asked for arrays of objects, which are pickles."""
    keywords = (node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword))
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return "allow_pickle" in keywords or any(
        len(call.args) > 2 and ast.unparse(call.func) in ("np.load", "numpy.load") for call in calls
    )


def unsafe_names(source: str) -> set[str]:
    tree = ast.parse(source)
    found = {name for name in names_in(tree) if UNSAFE.fullmatch(name)}
    return found | ({"allow_pickle"} if asks_for_objects(tree) else set())


def test_all_packages_are_looked_at():
    assert len(SOURCES) > 60
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == {*FOLDERS, "configs"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_are_read_by_the_safe_loader_alone(path):
    allowed = ALLOWED.get(path.relative_to(ROOT).as_posix(), set())
    assert unsafe_names(path.read_text()) == allowed


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch\ntorch.load(path)", "torch.load"),
        ("import torch as t\nread = t.load", "torch.load"),
        (
            "import torch.hub\ntorch.hub.load_state_dict_from_url(url)",
            "torch.hub.load_state_dict_from_url",
        ),
        ("from torch import load as read", "torch.load"),
        ("def f():\n    from torch import hub\n    hub.load(path)", "torch.hub.load"),
        ("import pickle\npickle.loads(data)", "pickle.loads"),
        ("from pickle import Unpickler", "pickle.Unpickler"),
        ("import numpy as np\nnp.load(path, allow_pickle=True)", "allow_pickle"),
        ("from mmengine.runner import load_checkpoint", "mmengine.runner.load_checkpoint"),
        (
            "from mmengine.runner.checkpoint import _load_checkpoint",
            "mmengine.runner.checkpoint._load_checkpoint",
        ),
        ("import mmengine\nmmengine.load('a.pkl')", "mmengine.load"),
        ("from mmdet.apis import init_detector", "mmdet.apis.init_detector"),
        ("from timm.models import load_checkpoint", "timm.models.load_checkpoint"),
        ("import timm\ntimm.models.load_pretrained(model)", "timm.models.load_pretrained"),
        ("from torch import *", "torch.*"),
        ("import numpy as np\nnp.load(path, None, True)", "allow_pickle"),
        ("eval(text)", "eval"),
        (
            "from mmengine import Config\nConfig.fromstring(text, '.py')",
            "mmengine.Config.fromstring",
        ),
        ("import yaml\nyaml.unsafe_load(text)", "yaml.unsafe_load"),
    ],
)
def test_unsafe_loading_is_recognised(source, name):
    assert unsafe_names(source) == {name}


@pytest.mark.parametrize(
    "source",
    [
        "import numpy as np\nnp.load(path)",
        "import json\njson.loads(text)",
        "import yaml\nyaml.safe_load(text)",
        "model.eval()",
        "from flash_internimage.checkpoint import load_checkpoint\nload_checkpoint(path)",
        "import torch\ntorch.save(x, path)\nmodel.load_state_dict(x)",
    ],
)
def test_other_loading_is_not(source):
    assert unsafe_names(source) == set()
