"""Test the package for Hugging Face's kernel hub, in a process that runs Triton's interpreter."""

import ast
import base64
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import write_hub_kernel

pytest.importorskip("triton")

# Loads the package as `kernels` does, and compares its layer with the reference.
PROGRAM = """
import importlib.util, json, sys
from pathlib import Path
import torch
from ops_dcnv4 import reference
from torch._subclasses import FakeTensorMode

def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

folder = Path(sys.argv[1], "build", "torch-cuda")
metadata = json.loads((folder / "metadata.json").read_text())
kernel = load(metadata["id"], folder / "__init__.py")
layer = kernel.layers.MultiScaleDeformableAttention()

torch.manual_seed(0)
shapes = [(3, 4), (2, 2)]
value = torch.randn(2, 16, 2, 3)
locations, weights = torch.rand(2, 5, 2, 2, 3, 2), torch.rand(2, 5, 2, 2, 3)
leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
levels = torch.tensor(shapes), torch.tensor([0, 12])
grad = torch.randn(2, 5, 6)
arguments = value, levels[0], shapes, levels[1], locations, weights, 64
expected = reference.ms_deform_attn(value, *levels, locations, weights)
expected_grads = reference.ms_deform_attn_backward(grad, value, *levels, locations, weights)

old = load("ops_dcnv4_of_an_earlier_loader", folder / "ops_dcnv4" / "__init__.py")
for call in (layer, old.layers.MultiScaleDeformableAttention()):
    output = call(*arguments)
    torch.testing.assert_close(output, expected)
    for actual, e in zip(torch.autograd.grad(output, leaves, grad), expected_grads):
        torch.testing.assert_close(actual, e)
assert getattr(torch.ops, metadata["id"]).ms_deform_attn

with FakeTensorMode() as mode:  # what torch.compile traces with
    fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    output = layer(*fakes)
    assert output.shape == expected.shape
    leaves = fakes[0], fakes[4], fakes[5]
    fake_grads = torch.autograd.grad(output, leaves, mode.from_tensor(grad))
    assert [g.shape for g in fake_grads] == [leaf.shape for leaf in leaves]
assert set(kernel.__all__) == set(old.__all__) == {"layers", "ms_deform_attn"}
print("the layer equals the reference")
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "new" / "ops-dcnv4"
    assert write_hub_kernel.main([str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_layer_of_the_package_equals_the_reference(repository):
    # TRITON_INTERPRET must be set when Triton is imported, so the process cannot be forked.
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, repository], cwd=write_hub_kernel.ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-5000:]
    assert ended.stdout == "the layer equals the reference\n"


def test_repository_has_the_layout_of_the_hub(repository):
    package = repository / "build" / "torch-cuda"
    metadata = json.loads((package / "metadata.json").read_text())
    assert (metadata["name"], metadata["backend"]) == ("ops-dcnv4", {"type": "cuda"})
    assert metadata["id"].isidentifier()
    found = [path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    paths = {str(path.relative_to(package)) for path in found}
    digest = metadata["digest"]
    assert set(digest["files"]) == paths - {"metadata.json"}
    for path, expected in digest["files"].items():
        contents = (package / path).read_bytes()
        assert base64.b64encode(hashlib.sha256(contents).digest()).decode() == expected
    assert (repository / "README.md").read_text().startswith("---\nlibrary_name: kernels\n")
    assert sorted(path.name for path in repository.iterdir()) == ["LICENSE", "README.md", "build"]
    assert [path.name for path in repository.parent.iterdir()] == ["ops-dcnv4"]


def test_package_imports_itself_relatively(repository):
    for path in repository.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            else:
                continue
            assert not any(module.startswith("ops_dcnv4") for module in modules), path


def test_identifier_depends_on_the_contents():
    files = write_hub_kernel.package_files()
    changed = files | {"layers.py": files["layers.py"] + b"\n"}
    identifiers = [write_hub_kernel.describe(f)["id"] for f in (files, files, changed)]
    assert identifiers[0] == identifiers[1] != identifiers[2]


def test_existing_files_are_not_overwritten(repository, capsys):
    for folder in (repository, repository / "LICENSE"):
        with pytest.raises(SystemExit) as ended:
            write_hub_kernel.main([str(folder)])
        assert ended.value.code == 2
        assert f"FOLDER must be new or empty, got {folder}\n" in capsys.readouterr().err


def test_empty_folder_is_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert write_hub_kernel.main(["."]) == 0
    assert (tmp_path / "build" / "torch-cuda" / "__init__.py").exists()
