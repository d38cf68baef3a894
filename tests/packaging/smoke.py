"""Check an installation from wheels, from outside of the checkout.

Run `python tests/packaging/smoke.py` with the Python of that installation. Classification and
OpenMMLab are checked if their extras are installed; `--require train openmmlab` makes a missing one
a failure. Exits with code 1 at the first failure.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor

import flash_internimage
import ops_dcnv4
from flash_internimage.checkpoints import read_zoo
from flash_internimage.configs import find_config

INSTALLED = [Path(sysconfig.get_path(scheme)) for scheme in ("purelib", "platlib")]
CHECKS: dict[str, Callable[[], str]] = {}


def check(function: Callable[[], str]) -> Callable[[], str]:
    """Register a check, which returns what it found."""
    CHECKS[function.__name__] = function
    return function


def run(*arguments: str, code: int = 0) -> str:
    """Run the console program in an empty folder; return its output or, on errors, the message."""
    program = Path(sysconfig.get_path("scripts"), "flash-internimage")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([program, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == code, f"{arguments} exited with {done.returncode}:\n{done.stderr}"
    return done.stderr if code else done.stdout


@check
def packages_are_installed() -> str:
    folders = [Path(module.__file__ or "").parent for module in (flash_internimage, ops_dcnv4)]
    assert all(folder.parent in INSTALLED for folder in folders), f"{folders} are not installed"
    return f"{folders[0].parent}, Python {sys.version.split()[0]}, torch {torch.__version__}"


@check
def operators_are_compiled() -> str:
    """Compare the compiled operators with the reference, forward and backward."""
    assert ops_dcnv4.choose_backend("cpu") == "compiled", ops_dcnv4.explain_backend("cpu")
    generator = torch.Generator().manual_seed(0)
    value = torch.rand(2, 9, 7, 32, generator=generator)
    offset_mask = torch.rand(2, 9, 7, 56, generator=generator) * 4 - 2

    def run_with(backend: str) -> list[Tensor]:
        inputs = [value.clone().requires_grad_(), offset_mask.clone().requires_grad_()]
        with ops_dcnv4.use_backend(backend):
            output = ops_dcnv4.dcnv4(*inputs, groups=2)
            return [output, *torch.autograd.grad(output.square().sum(), inputs)]

    for actual, expected in zip(run_with("compiled"), run_with("reference"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    return ops_dcnv4.explain_backend("cpu")


@check
def timm_creates_the_models() -> str:
    model = timm.create_model("flash_internimage_nano", num_classes=5).eval()
    with torch.inference_mode():
        assert model(torch.rand(1, 3, 64, 64)).shape == (1, 5)
    return ", ".join(timm.list_models("flash_internimage*"))


@check
def configs_are_shipped() -> str:
    configs = {find_config(entry.config) for entry in read_zoo().values() if entry.config}
    folder = Path(os.path.commonpath(configs))
    assert folder.is_relative_to(Path(flash_internimage.__file__ or "").parent), folder
    return f"{len(configs)} in {folder}"


@check
def console_program_runs() -> str:
    names = [line.split()[0] for line in run("zoo", "list").splitlines()[1:]]
    assert names == list(read_zoo()), names
    assert "usage: flash-internimage train" in run("train", "--help")
    assert "invalid choice: 'trian'" in run("trian", code=2)
    return run("--version").strip()


def classification() -> str:
    """Check the classification engine, by its demo on a few images."""
    with tempfile.TemporaryDirectory() as folder:
        digits, out = f"{folder}/digits", f"{folder}/out"
        run("demo-data", "digits", "--root", digits)
        shorter = ["schedule.epochs=1", "schedule.warmup_epochs=0", "batch_size=256"]
        train = ["train", "flash_internimage_nano_digits", f"data.root={digits}", f"output={out}"]
        run(*train, *shorter)
        lines = run("test", f"{out}/config.yaml", f"{out}/last.pth", "--limit", "50").splitlines()
    result = json.loads(lines[-1])
    assert result["images"] == 50, result
    return f"top-1 {result['top1']} % after an epoch"


def openmmlab() -> str:
    """Check that each detector and segmentor of the demos is built from its shipped config."""
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    built = []
    for name in (
        "mask_rcnn_flash_internimage_nano_fpn_digits_scenes",
        "dino-4scale_flash_internimage_nano_digits_scenes",
        "upernet_flash_internimage_nano_digits_scenes",
        "mask2former_flash_internimage_nano_digits_scenes",
    ):
        cfg = Config.fromfile(find_config(name))
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            model = MODELS.build(cfg.model).eval()
        with torch.inference_mode():
            features = model.backbone(torch.rand(1, 3, 64, 64))
        assert [f.shape[-1] for f in features] == [16, 8, 4, 2][-len(features) :]
        built.append(type(model).__name__)
        assert "usage: flash-internimage test" in run("test", name, "--help")
    return ", ".join(built)


EXTRAS = {"train": (classification, "pydantic"), "openmmlab": (openmmlab, "mmengine")}


def main() -> None:
    """Run the checks."""
    parser = argparse.ArgumentParser(description="Check an installation from wheels.")
    parser.add_argument("--require", nargs="*", choices=EXTRAS, default=[], metavar="EXTRA")
    required = parser.parse_args().require
    checks = dict(CHECKS)
    for extra, (function, package) in EXTRAS.items():
        if extra in required or importlib.util.find_spec(package):
            checks[extra] = function
        else:
            sys.stdout.write(f"{extra}: not installed\n")
    for name, function in checks.items():
        sys.stdout.write(f"{name.replace('_', ' ')}: {function()}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
