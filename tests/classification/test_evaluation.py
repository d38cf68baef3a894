"""Tests of evaluation and of the command line of classification.test."""

import json
import os
import pickle
import runpy
import shutil
import sys

import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flash_internimage.checkpoints import load_checkpoint, save_atomically
from flash_internimage.classification import evaluation, precision
from flash_internimage.classification.cli import test as command_line
from flash_internimage.classification.cli.test import main
from flash_internimage.classification.config import Data
from flash_internimage.classification.data import build_dataset, val_loader
from flash_internimage.classification.evaluation import evaluate, evaluate_checkpoint
from flash_internimage.classification.model import build_model
from flash_internimage.classification.precision import resolve_amp
from tests import processes
from tests.classification.helpers import CPU


def test_evaluation_counts_hits_and_averages_the_loss():
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(50) % 8
    targets[7] = -1  # an unreadable image
    result = evaluate(nn.Identity(), DataLoader(TensorDataset(logits, targets), 16), CPU)
    logits, targets = logits[targets >= 0].double(), targets[targets >= 0]
    rank = (logits > logits.gather(1, targets[:, None])).sum(1)
    assert result.top1 == pytest.approx(100 * (rank < 1).double().mean())
    assert result.top5 == pytest.approx(100 * (rank < 5).double().mean())
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, targets).item())
    assert (result.images, result.corrupt) == (49, 1)


def test_images_with_non_finite_logits_are_counted_as_wrong(caplog):
    logits = torch.eye(4).repeat(3, 1)
    logits[0, 0] = torch.nan
    logits[5, 1] = torch.inf
    targets = torch.arange(4).repeat(3)
    result = evaluate(nn.Identity(), DataLoader(TensorDataset(logits, targets), 5), CPU)
    assert (result.nonfinite, result.images) == (2, 12)
    assert result.top1 == result.top5 == pytest.approx(100 * 10 / 12)
    assert "2 of 12 images have non-finite logits" in caplog.text


@pytest.mark.parametrize("label", [4, -2])
def test_a_label_outside_the_classes_is_a_one_line_error(label):
    data = TensorDataset(torch.eye(4), torch.tensor([0, 1, 2, label]))
    with pytest.raises(ValueError, match=rf"^labels must be from 0 to 3, .*, got {label}$"):
        evaluate(nn.Identity(), DataLoader(data, 2), CPU)


@pytest.mark.slow
def test_evaluation_restores_training_mode(config, digits):
    model = build_model(config().model).train()
    data = Data(root=str(digits), image_size=32, workers=0)
    dataset = build_dataset(data, "val", False, 8)
    assert evaluate(model, val_loader(dataset, data, 8, CPU), CPU).images == 20
    assert model.training


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "column"), [("ema", "ema"), ("model", "val")])
def test_the_command_reproduces_the_metrics_of_training(run, tmp_path, capsys, weights, column):
    arguments = [str(run / "config.yaml"), "--checkpoint", str(run / "last.pth"), "--workers", "0"]
    assert main([*arguments, "--weights", weights, "--json", str(tmp_path / "result.json")]) == 0
    header, *_, last = (run / "metrics.csv").read_text().split()
    row = dict(zip(header.split(","), last.split(","), strict=True))
    result = json.loads((tmp_path / "result.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result["top1"] == pytest.approx(float(row[f"{column}_top1"]), abs=1e-4)
    assert result["loss"] == pytest.approx(float(row[f"{column}_loss"]), abs=1e-4)
    assert result["images"] == 20
    same = evaluate_checkpoint(run / "config.yaml", checkpoint=run / "last.pth", weights=weights)
    assert same == result | {"images_per_second": same["images_per_second"]}


@pytest.mark.parametrize("option", [{"weights": "EMA"}, {"amp": "fp8"}])
def test_error_names_the_invalid_option(run, option):
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"^{name} must be .*, got '{value}'$"):
        evaluate_checkpoint(run / "config.yaml", checkpoint=run / "last.pth", **option)


@pytest.mark.parametrize(
    ("amp", "device", "has_bf16", "resolved"),
    [
        ("auto", "cuda", True, "fp16"), ("auto", "mps", True, "off"),
        ("auto", "cpu", False, "off"), ("auto", "cpu", True, "bf16"),
        ("fp16", "cpu", True, "fp16"), ("bf16", "cuda", False, "bf16"), ("off", "cpu", True, "off"),
    ],
)  # fmt: skip
def test_automatic_precision_depends_on_the_device(monkeypatch, amp, device, has_bf16, resolved):
    monkeypatch.setattr(precision, "has_bf16_instructions", lambda: has_bf16)
    assert resolve_amp(amp, torch.device(device)) == resolved


@pytest.mark.slow
def test_throughput_needs_no_data(run, capsys):
    assert main([str(run / "config.yaml"), "--throughput", "--batch-size", "2"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images_per_second"] > 0


@pytest.mark.parametrize("option", ["--checkpoint", "--data", "--split", "--limit"])
def test_throughput_rejects_options_without_effect(run, option, caplog):
    assert main([str(run / "config.yaml"), "--throughput", option, "3"]) == 2
    assert caplog.messages[-1].endswith(f"uses random weights and images: remove {option}")


def test_a_model_without_released_weights_needs_a_checkpoint(run, caplog):
    assert main([str(run / "config.yaml")]) == 2
    message = "flash_internimage_nano has no released weights: pass a checkpoint"
    assert caplog.messages[-1] == message


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_checkpoint_with_code_is_rejected_without_running_it(run, tmp_path, caplog):
    with open(tmp_path / "hostile.pth", "wb") as file:
        pickle.dump({"model": Hostile(tmp_path / "marker")}, file)
    arguments = [str(run / "config.yaml"), "--checkpoint", str(tmp_path / "hostile.pth")]
    assert main(arguments) == 2
    assert "hostile.pth is damaged or not a checkpoint" in caplog.text
    assert not (tmp_path / "marker").exists()


def test_wrong_inputs_are_reported_by_the_command(run, digits, tmp_path, caplog):
    checkpoint = load_checkpoint(run / "last.pth")["model"]
    del checkpoint["levels.0.blocks.0.mlp.fc1.weight"]
    config, data = str(run / "config.yaml"), ["--data", str(digits)]
    partial = str(tmp_path / "partial.pth")
    save_atomically(checkpoint, partial)
    cases = {
        "must be a timm model or a .yaml file": ["flash_internimage_nanno", *data],
        "checkpoint not found: none.pth": [config, "--checkpoint", "none.pth"],
        "missing: levels.0.blocks.0.mlp.fc1": [config, "--checkpoint", partial],
        "must have the model's 1000 classes, got 10 in": [
            "flash_internimage_nano", "--checkpoint", str(run / "last.pth"), *data,
        ],
        "data.root not found": [config, "--checkpoint", "none.pth", "--data", "nowhere"],
    }  # fmt: skip
    for message, arguments in cases.items():
        caplog.clear()
        assert main(arguments) == 2
        assert message in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--workers", "-1"], "--workers must be at least 0, got -1"),
        (["--workers", "9999"], "--workers must be at most 1024, got 9999"),
        (["--batch-size", "10000000"], "--batch-size must be at most 65536, got 10000000"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--device", "gpu"], "device must be 'auto' or one of cpu"),
        (["--device", "cuda:99"], "got 'cuda:99'"),
        (["--json", "nowhere/result.json"], "--json must be in a writable folder, got"),
        (["--json", "."], "--json must be a file, got ."),
        (
            ["data.workers=1"],
            "key=value must set one of data.kind, data.max_corrupt, model.num_classes,",
        ),
        (["optimizer.lr=1"], "data.std, model.name, model.args, got optimizer.lr=1"),
        (["data.crop_pct=2"], "data.crop_pct: Input should be less than or equal to 1, got 2"),
        (["--split", ""], "split must not be empty, got ''"),
        (["--split", "test"], "must contain a folder 'test', got train, val"),
        (
            ["--data", "README.md"],
            "README.md cannot be read as a dataset: it must be a folder or an",
        ),
        (["--checkpoint", "tests"], "tests"),
    ],
)
def test_a_wrong_argument_is_a_one_line_error_before_any_work(
    run, monkeypatch, caplog, arguments, message
):
    monkeypatch.setattr(evaluation, "evaluate", None)
    caplog.clear()
    assert main([str(run / "config.yaml"), "--checkpoint", str(run / "last.pth"), *arguments]) == 2
    (record,) = [r for r in caplog.records if r.levelname == "ERROR"]
    assert message in record.getMessage()
    assert "\n" not in record.getMessage()


def test_overrides_without_a_config_are_a_one_line_error(caplog):
    assert main(["flash_internimage_tiny", "data.crop_pct=0.9"]) == 2
    message = "key=value must be used with a CONFIG.yaml, got data.crop_pct=0.9 with model 'flash_i"
    assert message in caplog.text


def test_a_model_other_than_a_classifier_is_a_one_line_error(digits, caplog):
    assert main(["vit_small_patch14_dinov2", "--data", str(digits)]) == 2
    assert "model must be a classifier, got 'vit_small_patch14_dinov2'" in caplog.text


def test_settings_that_differ_from_training_are_a_warning(run, tmp_path, caplog):
    settings = yaml.safe_load((run / "config.yaml").read_text())
    arguments = [str(tmp_path / "c.yaml"), "--checkpoint", str(run / "last.pth"), "--workers", "0"]

    def warnings(**data) -> list[str]:
        changed = settings | {"data": settings["data"] | data}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(changed))
        caplog.clear()
        assert main(arguments) == 0
        return [r.getMessage() for r in caplog.records if "settings differ" in r.getMessage()]

    assert not warnings()
    assert not warnings(max_corrupt=3, train_split="another")
    assert main([*arguments, "data.crop_pct=0.5"]) == 0
    assert "data.crop_pct is 0.5, was 1.0 in training;" in caplog.text
    others = {
        "image_size": 40, "crop_pct": 0.5, "interpolation": "nearest", "mean": [0.0, 0.5, 1.0],
        "std": [1.0, 1.0, 1.0],
    }  # fmt: skip
    (line,) = warnings(**others)
    for key, value in others.items():
        assert f"data.{key} is {value}, was {settings['data'][key]} in training" in line


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_checkpoint_with_non_finite_weights_is_a_one_line_error(run, tmp_path, caplog, value):
    weights = load_checkpoint(run / "last.pth")["model"]
    weights["head.weight"][0, 0] = value
    torch.save(weights, tmp_path / "broken.pth")
    arguments = [str(run / "config.yaml"), "--checkpoint", str(tmp_path / "broken.pth")]
    assert main([*arguments, "--json", str(tmp_path / "result.json")]) == 2
    assert f"head.weight of {tmp_path}/broken.pth is not finite" in caplog.text
    assert not (tmp_path / "result.json").exists()


def test_non_finite_logits_are_a_one_line_error(run, tmp_path, capsys, caplog):
    weights = load_checkpoint(run / "last.pth")["model"]
    weights["head.weight"].fill_(3e38)
    weights["head.bias"].fill_(3e38)
    torch.save(weights, tmp_path / "large.pth")
    arguments = [str(run / "config.yaml"), "--checkpoint", str(tmp_path / "large.pth")]
    assert main([*arguments, "--json", str(tmp_path / "result.json")]) == 2
    assert "non-finite logits for 20 of 20 images" in caplog.text
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "result.json").exists()


def test_unreadable_images_are_skipped(run, digits, tmp_path, capsys):
    shutil.copytree(digits, tmp_path / "damaged")
    next((tmp_path / "damaged" / "val" / "3").iterdir()).write_text("not an image")
    arguments = ["--checkpoint", str(run / "last.pth"), "--data", str(tmp_path / "damaged")]
    assert main([str(run / "config.yaml"), *arguments]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["images"], result["corrupt"]) == (19, 1)


@pytest.mark.slow
def test_two_processes_share_the_images_and_report_once(run, digits, tmp_path, capfd):
    shutil.copytree(digits, tmp_path / "damaged")
    next((tmp_path / "damaged" / "val" / "3").iterdir()).write_text("not an image")
    arguments = [str(run / "config.yaml"), "--checkpoint", str(run / "last.pth"), "--device", "cpu"]
    arguments += ["--data", str(tmp_path / "damaged"), "--workers", "0", "--limit", "19"]
    assert main(arguments) == 0
    one = json.loads(capfd.readouterr().out.splitlines()[-1])
    output = tmp_path / "result.json"
    ended = processes.run_distributed("-m", "classification.test", *arguments, "--json", output)
    out = "".join(process.checked().stdout for process in ended)
    err = "".join(process.stderr for process in ended)
    two = json.loads(output.read_text())
    assert out.count("images_per_second") == 2  # in the table and in the JSON line
    assert json.loads(out.splitlines()[-1]) == two
    assert err.count("skipped: ") == 1
    assert (two["images"], two["corrupt"]) == (18, 1)
    assert two.pop("images_per_second") > 0
    del one["images_per_second"]
    assert two == pytest.approx(one, abs=2e-4)


def test_throughput_rejects_several_processes(run, monkeypatch, caplog):
    monkeypatch.setattr(command_line, "world_size", lambda: 2)
    assert main([str(run / "config.yaml"), "--throughput"]) == 2
    message = "--throughput measures a single process: run it without torchrun"
    assert [record.getMessage() for record in caplog.records] == [message]


def test_the_former_name_of_the_program_runs_it_and_warns_once(monkeypatch, caplog):
    monkeypatch.setattr(sys, "argv", ["validate", "resnet18", "--limit", "0"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("classification.validate", run_name="__main__")
    assert [record.getMessage() for record in caplog.records] == [
        "classification.validate is deprecated: use python -m classification.test",
        "--limit must be at least 1, got 0",
    ]
