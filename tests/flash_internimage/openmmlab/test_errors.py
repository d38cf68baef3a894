"""Test that user errors end the scripts with one line, and bugs with a traceback."""

import errno
import importlib
import logging
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from unittest.mock import Mock, call

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, METRICS, MODELS
from mmengine.visualization import LocalVisBackend
from mmseg.datasets.transforms import RandomCrop

from flash_internimage.files import own_folder
from flash_internimage.openmmlab import SafeRunner
from flash_internimage.openmmlab.cli import train as program
from flash_internimage.openmmlab.cli.common import build_runner
from flash_internimage.openmmlab.cli.test import evaluation_config, evaluation_parser
from flash_internimage.openmmlab.engine.hooks import curves
from flash_internimage.openmmlab.errors import describe, one_line_errors
from tests import processes
from tests.flash_internimage.openmmlab.small import Model, Score

CONFIG = """
default_scope = "mmengine"
model = dict(type="SmallModel")
loader = dict(
    batch_size=2, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="SmallData"),
)
train_dataloader = val_dataloader = test_dataloader = loader
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.1))
train_cfg = dict(by_epoch=True, max_epochs=2)
val_cfg = test_cfg = dict()
val_evaluator = test_evaluator = dict(type="SmallScore", scores=[0.1, 0.2])
default_hooks = dict(checkpoint=dict(
    type="AtomicCheckpointHook", interval=1, save_best="score", rule="greater", max_keep_ckpts=1
))
custom_hooks = [dict(type="CheckFiniteHook")]
"""


class SmallData(BaseDataset):
    def load_data_list(self) -> list[dict]:
        return [{"value": float(i), "img_path": f"{i}.png"} for i in range(4)]

    def __getitem__(self, index: int) -> dict:
        return {"inputs": torch.full((3,), self.get_data_info(index)["value"])}


class Defect(SmallData):
    def __getitem__(self, index: int) -> dict:
        raise KeyError("boxes")


class Damaged(SmallData):
    def __getitem__(self, index: int) -> dict:
        raise ValueError("picture.jpg is damaged")


class Unsupported(SmallData):
    def __getitem__(self, index: int) -> dict:
        raise NotImplementedError("masks cannot be mixed")


class Asserting(SmallData):
    def __getitem__(self, index: int) -> dict:
        raise AssertionError


class UnsupportedModel(Model):
    def forward(self, inputs, mode="tensor"):
        raise NotImplementedError("no such kernel")


class DefectiveModel(Model):
    def forward(self, inputs, mode="tensor"):
        raise TypeError("cannot multiply")


@pytest.fixture(autouse=True)
def registered():
    """Register the classes used by the config for one test."""
    added = {
        DATASETS: (SmallData, Defect, Damaged, Unsupported, Asserting),
        MODELS: (Model, DefectiveModel, UnsupportedModel),
        METRICS: (Score,),
    }
    names = {Model: "SmallModel", Score: "SmallScore"}
    for registry, classes in added.items():
        for one in classes:
            name = names.get(one, one.__name__)
            registry.register_module(name=name, module=one, force=True)
    yield
    for registry, classes in added.items():
        for one in classes:
            registry._module_dict.pop(names.get(one, one.__name__))


@pytest.fixture
def train(tmp_path, request) -> Callable[..., None]:
    """Run the training script with these arguments."""
    config = tmp_path / f"{re.sub(r'[^a-z]', '', request.node.name)}.py"

    def train(*options: object, text: str | bytes = CONFIG) -> None:
        config.write_bytes(text if isinstance(text, bytes) else text.encode())
        arguments = [str(config), "--work-dir", str(tmp_path / "run"), *map(str, options)]
        with one_line_errors():
            program.run_training(program.training_parser("train", "").parse_args(arguments))

    return train


@pytest.fixture
def fails(train, capsys) -> Callable[..., None]:
    def fails(message: str, *options: object, **kwargs) -> None:
        with pytest.raises(SystemExit) as ended:
            train(*options, **kwargs)
        assert ended.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        assert [line for line in lines if re.search(f"^error: .*{message}", line)] == lines
        assert len(lines) == 1

    return fails


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("optim_wrapper.optimizer.type=Nothing", "must be a registered optimizer, got 'Nothing'"),
        ("optim_wrapper.optimizer.type=3", "must be a registered optimizer, got 3"),
        ("optim_wrapper.optimizer=None", r"optim_wrapper\.optimizer must be a dict, got None"),
        ("optim_wrapper.optimizer.type=LBFGS", "and without a closure, got LBFGS"),
        ("optim_wrapper.optimizer.type=Muon", "Muon"),
        ("optim_wrapper.optimizer.speed=1", "unexpected keyword argument 'speed'"),
        ("optim_wrapper.optimizer.lr=nan", r"optim_wrapper\.optimizer\.lr must be finite, got nan"),
        ("optim_wrapper.optimizer.lr=inf", r"optim_wrapper\.optimizer\.lr must be finite, got inf"),
        ("optim_wrapper.optimizer.lr=fast", "lr must be a number, got 'fast'"),
        ("optim_wrapper.optimizer.lr=True", "lr must be a number, got True"),
        ("optim_wrapper.optimizer.lr=-1", "optim_wrapper: .* -1"),
        ("optim_wrapper.optimizer.nesterov=True", "optim_wrapper: Nesterov momentum requires"),
        ("optim_wrapper.type=Nothing", "Nothing is not in the"),
        ("optim_wrapper.accumulative_counts=0", "accumulative_counts must be a positive integer"),
        ("train_cfg.max_epochs=inf", r"train_cfg\.max_epochs must be finite"),
        ("train_cfg.max_epochs=.inf", r"max_epochs must be a positive integer, got '\.inf'"),
        ("train_cfg.max_epochs=True", "max_epochs must be a positive integer, got True"),
        ("train_cfg.max_epochs=1.5", "max_epochs must be a positive integer, got 1.5"),
        ("train_dataloader.batch_size=0", r"train_dataloader\.batch_size must be a positive"),
        (
            "train_dataloader.num_workers=1.5",
            "num_workers must be an integer of at least 0, got 1.5",
        ),
        ("train_dataloader.num_workers=-1", "num_workers must be an integer of at least 0, got -1"),
        ("optim_wrapper.clip_grad.max_norm=-1", "max_norm must be a positive number, got -1"),
        ("optim_wrapper.clip_grad.clip_value=nan", "clip_value must be a positive number, got nan"),
        ("randomness.seed=abc", "randomness.seed must be an integer of at least 0, got 'abc'"),
        ("default_hooks.checkpoint.interval=0", "interval must be a positive integer, or -1"),
        ("train_dataloader.dataset.type=Nothing", "Nothing is not in the .*dataset registry"),
        ("train_dataloader.dataset.type=Damaged", r"picture\.jpg is damaged"),
        ("default_hooks.checkpoint.rule=upward", "rule must be greater, less or None"),
        ("model.type=Nothing", "Nothing is not in the .*model registry"),
        ("model.type=LinearLR", "LinearLR is not in the .*model registry"),
        ("model.type=ExponentialMovingAverage", "argument"),
        ("model=small", "model must be a dict, got 'small'"),
        ("optim_wrapper=None", "optim_wrapper must be a dict, got None"),
        ("optim_wrapper=SGD", "optim_wrapper must be a dict, got 'SGD'"),
        ("default_hooks=3", "default_hooks must be a dict, got 3"),
        ("model.depth=3", "unexpected keyword argument 'depth'"),
    ],
)
def test_settings(option, message, fails, tmp_path):
    fails(message, "--cfg-options", option)
    assert not list((tmp_path / "run").glob("*.pth"))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("Unsupported", "^error: masks cannot be mixed$"),
        ("Asserting", "^error: AssertionError: raise AssertionError$"),
    ],
)
def test_data_that_a_transform_rejects(dataset, message, workers, train, capfd):
    options = f"train_dataloader.dataset.type={dataset}", f"train_dataloader.num_workers={workers}"
    with pytest.raises(SystemExit, match="2"):
        train("--cfg-options", *options)
    assert re.search(message, capfd.readouterr().err, re.MULTILINE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = (", r"config .*\.py cannot be read: SyntaxError"),
        (b"# caf\xe9\n", r"config .*\.py cannot be read: UnicodeDecodeError"),
        ("_base_ = 'none.py'", r"cannot be read: FileNotFoundError.*none\.py"),
        ("model = dict(depth=1 / 0)", "cannot be read: ZeroDivisionError"),
        ("raise SystemExit(0)", "cannot be read: SystemExit"),
        ("", "must contain a model"),
        ("model = depth", "cannot be read: NameError: name 'depth'"),
        ("custom_imports = dict(imports=['no.such'])", "ImportError: Failed to import no"),
    ],
)
def test_configs(text, message, fails):
    fails(message, text=text)


def test_a_config_that_is_its_own_base(fails, tmp_path):
    (tmp_path / "other.py").write_text("_base_ = 'other.py'")
    fails("RecursionError", text="_base_ = 'other.py'")


class TestFiles:
    def test_work_folder_that_cannot_be_written(self, fails, tmp_path):
        (tmp_path / "file").touch()
        for folder in (tmp_path / "file", tmp_path / "file" / "below"):
            fails(f"--work-dir {folder} cannot be written", "--work-dir", folder)

    def test_invalid_checkpoints(self, fails, tmp_path):
        (tmp_path / "notes.txt").write_text("no checkpoint")
        fails("--resume must be a checkpoint, got the folder", "--resume", tmp_path)
        for path, message in (
            (tmp_path / "notes.txt", "damaged or not a checkpoint"),
            (tmp_path / "none.pth", "checkpoint not found"),
        ):
            fails(message, "--resume", path)

    @pytest.mark.parametrize("task", ["detection", "segmentation"])
    def test_predictions_that_cannot_be_written(self, task, tmp_path, monkeypatch, capsys):
        (tmp_path / "file").touch()
        (tmp_path / "c.py").write_text(CONFIG)
        out = tmp_path / "file" / "x.pkl"
        arguments = ["test", str(tmp_path / "c.py"), "c.pth", "--out", str(out)]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit, match="2"):
            importlib.import_module(f"{task}.test").main()
        assert re.fullmatch(r"error: --out .* cannot be written: .*\n", capsys.readouterr().err)

    @pytest.mark.parametrize("program", ["train", "test"])
    @pytest.mark.parametrize("task", ["detection", "segmentation"])
    def test_missing_config(self, task, program, monkeypatch, capsys):
        arguments = ["none.py", *(["none.pth"] if program == "test" else [])]
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        with pytest.raises(SystemExit, match="2"):
            importlib.import_module(f"{task}.{program}").main()
        assert capsys.readouterr().err == "error: config not found: none.py\n"


@pytest.mark.parametrize(
    ("launcher", "message"),
    [
        ("pytorch", "requires torchrun, .*: RANK, .* is not set"),
        ("slurm", "requires srun, .*: SLURM_PROCID"),
        ("mpi", "requires mpirun, .*: OMPI_COMM_WORLD_RANK"),
    ],
)
def test_launcher_without_its_environment(launcher, message, fails, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM", "OMPI"))]:
        monkeypatch.delenv(name)
    fails(message, "--launcher", launcher)


class TestBugs:
    def test_bugs_keep_their_traceback(self, train):
        with pytest.raises(KeyError, match="boxes"):
            train("--cfg-options", "train_dataloader.dataset.type=Defect")
        with pytest.raises(TypeError, match="cannot multiply"):
            train("--cfg-options", "model.type=DefectiveModel")
        with pytest.raises(NotImplementedError, match="no such kernel"):
            train("--cfg-options", "model.type=UnsupportedModel")

    def test_bugs_of_this_package_keep_their_traceback(self):
        with pytest.raises(AttributeError), one_line_errors():
            curves.save_curves(None)

    @pytest.mark.parametrize(
        ("last", "message"),
        [
            ("ValueError: a.jpg: is damaged", "a.jpg: is damaged"),
            ("    f(x)\n    ^^^^\nValueError: two\n  lines: both\n", "two lines: both"),
            ("    raise NotImplementedError\nNotImplementedError", None),
            ("    assert f(\n           ^^\nAssertionError\n", "AssertionError: assert f("),
        ],
    )
    def test_the_message_of_a_worker_is_shown(self, last, message):
        text = (
            "Caught ValueError in DataLoader worker process 0.\n"
            "Original Traceback (most recent call last):\n"
            '  File "a.py", line 9, in b\n    y()\n'
            f'  File "x.py", line 1, in y\n{last}'
        )
        message = message or "NotImplementedError: raise NotImplementedError"
        assert describe(ValueError(text)) == message


SCRIPT = """
from flash_internimage.openmmlab.errors import end_in_one_line
users, defect = ValueError("no such\\nfile"), KeyError("boxes")
end_in_one_line(users)
raise {}
"""


@pytest.mark.parametrize(
    ("name", "code", "first", "last"),
    [
        ("users", 2, "error: no such file", "error: no such file"),
        ("defect", 1, "Traceback (most recent call last):", "KeyError: 'boxes'"),
    ],
)
def test_errors_that_the_calling_program_does_not_catch(name, code, first, last):
    ended = processes.run("-c", SCRIPT.format(name))
    lines = ended.stderr.splitlines()
    assert (ended.returncode, lines[0], lines[-1]) == (code, first, last)


def test_errors_of_the_runner_are_marked_unless_they_are_bugs(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # restored after the test
    for dataset, error, one_line in (("Damaged", ValueError, True), ("Defect", KeyError, None)):
        (tmp_path / "c.py").write_text(CONFIG.replace("SmallData", dataset))
        cfg = Config.fromfile(tmp_path / "c.py")
        cfg.work_dir, cfg.experiment_name = str(tmp_path / "run"), f"one_line_{dataset}"
        with pytest.raises(error) as raised:
            SafeRunner.from_cfg(cfg).train()
        assert getattr(raised.value, "ends_in_one_line", None) is one_line


@pytest.mark.parametrize("saved", [None, "epoch_2.pth"])
def test_an_interrupted_run_says_how_to_continue(saved, train, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    if saved:
        (tmp_path / "run" / saved).touch()
    monkeypatch.setattr(SafeRunner, "train", Mock(side_effect=KeyboardInterrupt))
    messages = Mock()
    monkeypatch.setattr(program, "log_warning", messages)
    with pytest.raises(KeyboardInterrupt):
        train(*(["--resume"] if saved else []))
    expected = f"continue from {saved} with --resume" if saved else "no checkpoint is saved"
    assert messages.mock_calls == [call(f"stopped; {expected}")]


class TestOneRunPerFolder:
    def test_a_second_run_fails_without_changes(self, fails, train, tmp_path, monkeypatch):
        monkeypatch.setattr(program, "own_folder", partial(own_folder, timeout=0))
        with own_folder(tmp_path / "run"):
            fails(r"another run is writing to .*/run")
            assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock"}
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / ".epoch_1.pth.0123.partial").touch()
        train()
        assert not list((tmp_path / "run").glob(".*partial"))
        assert (tmp_path / "run" / "epoch_2.pth").is_file()


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TestFullDisk:
    """A full disk ends a run with one line, also in the log; the run can be resumed."""

    @pytest.mark.parametrize(
        ("target", "name", "message"),
        [
            (os, "fsync", r"while writing .*/run/.*: free some space"),
            (LocalVisBackend, "_dump", r"while writing .*/run: free some space"),
            (logging.FileHandler, "flush", r"while writing .*/run: free some space"),
        ],
    )
    def test_all_writers(self, target, name, message, fails, train, tmp_path, monkeypatch):
        train("--cfg-options", "train_cfg.max_epochs=1")
        text = CONFIG.replace("[0.1, 0.2]", "[0.3]")
        with monkeypatch.context() as patch:
            patch.setattr(target, name, full)
            fails(rf"No space left on device {message}", "--resume", text=text)
        assert not list((tmp_path / "run").rglob("*.partial"))
        train("--resume", text=text)
        assert (tmp_path / "run" / "best_score_epoch_2.pth").is_file()
        logs = "".join(path.read_text() for path in (tmp_path / "run").glob("*/*.log"))
        assert "Logging error" not in logs
        if target is not logging.FileHandler:
            assert re.search("ERROR - .*No space left on device while writing", logs)


def test_non_finite_weights_are_an_error(train, fails, tmp_path, capsys):
    train("--cfg-options", "train_cfg.max_epochs=1")
    path = tmp_path / "run" / "epoch_1.pth"
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["state_dict"]["head.bias"][0] = float("nan")
    torch.save(checkpoint, path)
    fails(r"1 weights of .*epoch_1\.pth are not finite: head\.bias", "--resume")
    arguments = [str(next(tmp_path.glob("*.py"))), str(path), "--work-dir", str(tmp_path / "test")]
    args = evaluation_parser("test", "").parse_args(arguments)
    with pytest.raises(ValueError, match=r"1 weights of .* are not finite: head\.bias"):
        build_runner(evaluation_config(args)).test()


def test_an_evaluation_keeps_the_config_of_the_training(train, tmp_path):
    train("--cfg-options", "train_cfg.max_epochs=1")
    config = next(tmp_path.glob("*.py"))
    before = (tmp_path / "run" / config.name).read_text()
    assert "max_epochs=1" in before
    arguments = [str(config), str(tmp_path / "run" / "epoch_1.pth")]
    arguments += ["--work-dir", str(tmp_path / "run")]
    args = evaluation_parser("test", "").parse_args(arguments)
    build_runner(evaluation_config(args)).test()
    assert (tmp_path / "run" / config.name).read_text() == before


def test_warnings_are_logged(train, tmp_path):
    train(text=CONFIG.replace("[0.1, 0.2]", "[0.1, float('nan')]"))
    logs = "".join(path.read_text() for path in (tmp_path / "run").glob("*/*.log"))
    assert "not finite: score" in logs
    assert "4 of the 4 images of val_dataloader are also in train_dataloader" in logs
    assert (tmp_path / "run" / "best_score_epoch_1.pth").is_file()


def test_an_assertion_without_a_message_shows_its_condition():
    with pytest.raises(AssertionError) as raised:
        RandomCrop(crop_size=0)
    assert describe(raised.value) == "AssertionError: assert crop_size[0] > 0 and crop_size[1] > 0"


def test_unexpected_keywords_are_user_errors(capsys):
    with pytest.raises(SystemExit, match="2"), one_line_errors():
        MODELS.build({"type": "FlashInternImage", "arc": "tiny"})
    assert re.match("error: .* unexpected keyword argument 'arc'\n$", capsys.readouterr().err)
