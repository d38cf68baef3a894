"""Test how the scripts' arguments change a config before anything is built."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from mmengine.config import Config

from flash_internimage.openmmlab.cli import config as program_config
from flash_internimage.openmmlab.cli import train as program
from flash_internimage.openmmlab.cli.common import ending_together
from flash_internimage.openmmlab.cli.test import (
    evaluation_config,
    evaluation_parser,
    move_data,
    prepare_evaluation,
)

CONFIG = """
weights = "flash_internimage_tiny.in1k"
model = dict(backbone=dict(init_cfg=dict(type="Pretrained", checkpoint=weights)))
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.1))
custom_hooks = [dict(type="CurvesHook")]
train_dataloader = val_dataloader = test_dataloader = dict(batch_size=2)
train_cfg = dict(max_epochs=1)
val_cfg = test_cfg = dict()
"""


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "small.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def to_train(config, tmp_path, monkeypatch) -> Callable[..., Config]:
    monkeypatch.setattr(program, "build_runner", lambda cfg: cfg)

    def to_train(*options: str, settings: str = "") -> Config:
        config.write_text(CONFIG + settings)
        arguments = [str(config), "--work-dir", str(tmp_path / "run"), *options]
        args = program.training_parser("train", "").parse_args(arguments)
        return program.training_runner(args)

    return to_train


def hooks(cfg: Config) -> list[str]:
    return [hook["type"] for hook in cfg.custom_hooks]


def test_without_options_the_config_is_unchanged(to_train):
    cfg = to_train()
    assert hooks(cfg) == ["CurvesHook"]
    assert cfg.optim_wrapper.type == "OptimWrapper"
    assert cfg.model.backbone.init_cfg.checkpoint == "flash_internimage_tiny.in1k"


@pytest.mark.parametrize("option", [["--amp"], ["--amp", "fp16"]])
def test_float16_scales_the_loss(option, to_train):
    cfg = to_train(*option)
    scaled = {"type": "AmpOptimWrapper", "loss_scale": "dynamic", "dtype": "float16"}
    assert cfg.optim_wrapper == {**scaled, "optimizer": {"type": "SGD", "lr": 0.1}}
    assert hooks(cfg) == ["CurvesHook", "Float32OutputsHook"]


def test_compile(to_train):
    assert hooks(to_train("--compile")) == ["CurvesHook", "CompileBackboneHook"]


def test_pretrained_weights_are_not_loaded_if_a_checkpoint_replaces_them(to_train, tmp_path):
    assert to_train(settings='load_from = "other.pth"').model.backbone.init_cfg is None
    (tmp_path / "run").mkdir()
    assert to_train("--resume").model.backbone.init_cfg is not None
    (tmp_path / "run" / "epoch_1.pth").touch()
    assert to_train("--resume").model.backbone.init_cfg is None


@pytest.mark.parametrize(
    ("setting", "today"),
    [
        ("auto_resume = True", "--resume"),
        ("checkpoint_config = dict(interval=1)", "default_hooks.checkpoint"),
        ("cudnn_benchmark = True", "env_cfg.cudnn_benchmark"),
        ("data = dict(samples_per_gpu=1)", "train_dataloader, val_dataloader and test_dataloader"),
        ("dist_params = dict(backend='nccl')", "env_cfg.dist_cfg"),
        ("evaluation = dict(metric='bbox')", "val_evaluator, train_cfg.val_interval and "),
        ("fp16 = dict(loss_scale=512.0)", "--amp"),
        ("gpu_ids = range(1)", "torchrun and CUDA_VISIBLE_DEVICES"),
        ("log_config = dict(interval=50)", "default_hooks.logger and visualizer.vis_backends"),
        ("lr_config = dict(policy='step', step=[1])", "param_scheduler"),
        ("optimizer = dict(type='SGD', lr=0.2)", "optim_wrapper.optimizer"),
        ("optimizer_config = dict(grad_clip=None)", "optim_wrapper.clip_grad and "),
        ("resume_from = 'work/epoch_3.pth'", "--resume CHECKPOINT"),
        ("runner = dict(type='EpochBasedRunner', max_epochs=1)", "train_cfg"),
        ("seed = 3", "randomness.seed"),
        ("total_epochs = 12", "train_cfg.max_epochs"),
        ("workflow = [('train', 1)]", "train_cfg.val_interval"),
    ],
)
def test_obsolete_settings_name_their_replacement(setting, today, to_train, config):
    name = setting.split(" = ")[0]
    message = rf"obsolete settings of mmdet 2 or mmseg 0: for {name} use {today}"
    with pytest.raises(ValueError, match=rf"^{config} has {message}"):
        to_train(settings=setting)
    with pytest.raises(ValueError, match=f"^--cfg-options has {message}"):
        to_train("--cfg-options", f"{name}.lr=1")


def test_all_obsolete_settings_are_named_in_evaluations_too(config):
    config.write_text(f"{CONFIG}optimizer = dict(lr=1)\ntotal_epochs = 12\n")
    message = "for optimizer use .*; for total_epochs use "
    with pytest.raises(ValueError, match=message):
        to_evaluate(config)


def test_a_variable_may_have_an_obsolete_name(to_train):
    settings = """
optimizer = dict(type="SGD", lr=0.3)
optim_wrapper = dict(optimizer=optimizer)
total_epochs = 5
train_cfg = dict(max_epochs=total_epochs)
seed = 7
randomness = dict(seed=seed)
resume_from = None
"""
    cfg = to_train(settings=settings)
    assert (cfg.optim_wrapper.optimizer.lr, cfg.train_cfg.max_epochs) == (0.3, 5)


@pytest.mark.parametrize(
    "settings",
    [
        "data = dict(type='CheckedCocoDataset', data_root='parts/')",  # read by a derived config
        "data = 'parts/'",
        "optimizer = 'SGD'\nrunner = ['a']",
        "data = dict(train=dict(data_root='a'))\nloader = dict(dataset=data['train'])",
        "seed = 3\nval_dataloader = dict(sampler=dict(seed=seed))",
        "gpus, total_iters = 4, 100\nsize, end = 8 * gpus, total_iters // 2",
        "device = 'cpu'\nname = f'model on {device}'",
        "fp16 = True\nif fp16:\n    optim_wrapper = dict(type='AmpOptimWrapper')",
    ],
)
def test_settings_used_as_variables_are_allowed(settings, to_train):
    assert to_train(settings=settings).train_cfg == {"max_epochs": 1}


@pytest.mark.parametrize("name", ["_base_.gpus", "{{_base_.gpus}}"])
def test_variables_read_by_another_file_are_allowed(name, config, tmp_path):
    (tmp_path / "base.py").write_text(f"gpus = 4\n{CONFIG}")
    config.write_text(f"_base_ = 'base.py'\nsize = {name}\n")
    assert to_evaluate(config).size == 4
    config.write_text("_base_ = 'base.py'\nsize = 4  # of gpus\n")
    with pytest.raises(
        ValueError, match="obsolete settings of mmdet 2 or mmseg 0: for gpus use torchrun"
    ):
        to_evaluate(config)


class TestWorkFolder:
    """A run resumes from the latest checkpoint in its work folder."""

    @pytest.mark.parametrize(
        "name",
        [
            "best_score_epoch_3.pth",
            "epoch_12-1a2b3c4d.pth",
            "epoch_3.pth.tmp",
            "epoch_03.pth",
            "epoch_best.pth",
            "my_epoch_3.pth",
            "epoch_\u0663.pth",
            "latest.pth",
        ],
    )
    def test_other_files_are_ignored(self, name, to_train, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / name).touch()
        (tmp_path / "run" / "epoch_9.pth").mkdir()
        (tmp_path / "run" / "last_checkpoint").write_text("/elsewhere/epoch_7.pth")
        assert to_train().get("load_from") is None
        cfg = to_train("--resume")
        assert (cfg.get("load_from"), cfg.resume) == (None, False)
        (tmp_path / "run" / "epoch_2.pth").touch()
        assert to_train("--resume").load_from == str(tmp_path / "run" / "epoch_2.pth")

    @pytest.mark.parametrize(("by_epoch", "expected"), [(True, "epoch_3"), (False, "iter_200")])
    def test_epochs_or_iterations_as_configured(self, by_epoch, expected, to_train, tmp_path):
        (tmp_path / "run").mkdir()
        for name in ("epoch_2", "epoch_3", "iter_100", "iter_200"):
            (tmp_path / "run" / f"{name}.pth").touch()
        settings = f"default_hooks = dict(checkpoint=dict(by_epoch={by_epoch}))"
        assert Path(to_train("--resume", settings=settings).load_from).stem == expected

    def test_resume_in_the_config(self, to_train, tmp_path):
        cfg = to_train(settings="resume = True")
        assert (cfg.get("load_from"), cfg.resume) == (None, False)
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "epoch_2.pth").touch()
        (tmp_path / "run" / "last_checkpoint").write_text("/elsewhere/epoch_7.pth")
        cfg = to_train(settings="resume = True")
        assert (cfg.load_from, cfg.resume) == (str(tmp_path / "run" / "epoch_2.pth"), True)
        cfg = to_train(settings="resume = True\nload_from = 'other.pth'")
        assert (cfg.load_from, cfg.resume) == ("other.pth", True)


OUT_DIR = (
    "default_hooks = dict(checkpoint=dict(out_dir='{}/saved', filename_tmpl='m_{{:03d}}.pth'))"
)


class TestCustomNames:
    """`out_dir` and `filename_tmpl` of the checkpoint hook change where checkpoints are found."""

    def test_the_latest_checkpoint_is_found(self, to_train, tmp_path):
        settings = OUT_DIR.format(tmp_path)
        folder = tmp_path / "saved" / "run"
        folder.mkdir(parents=True)
        for number in (9, 10):
            (folder / f"m_{number:03d}.pth").touch()
        with pytest.raises(ValueError, match=rf"^{folder}/m_010\.pth exists: pass --resume"):
            to_train(settings=settings)
        assert to_train("--resume", settings=settings).load_from == str(folder / "m_010.pth")

    @pytest.mark.parametrize("settings", ["", OUT_DIR])
    def test_last_checkpoint_locates_a_run_with_other_names(self, settings, to_train, tmp_path):
        settings = settings.format(tmp_path)
        path = tmp_path / "before_7.pth"
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "last_checkpoint").write_text(str(path))
        assert to_train(settings=settings).get("load_from") is None
        path.touch()
        with pytest.raises(ValueError, match=f"^{path} exists: pass --resume"):
            to_train(settings=settings)
        assert to_train("--resume", settings=settings).load_from == str(path)

    def test_a_run_started_without_out_dir_is_found(self, to_train, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "epoch_7.pth").touch()
        cfg = to_train("--resume", settings=OUT_DIR.format(tmp_path))
        assert cfg.load_from == str(tmp_path / "run" / "epoch_7.pth")

    @pytest.mark.parametrize("note", [b"", b"\xff\x00", b"a" * 5000])
    def test_a_damaged_last_checkpoint_is_ignored(self, note, to_train, tmp_path):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "last_checkpoint").write_bytes(note)
        assert to_train().get("load_from") is None

    def test_the_searched_folder_is_logged_if_there_is_no_checkpoint(self, to_train, tmp_path, log):
        log.set_level("INFO")
        to_train("--resume", settings=OUT_DIR.format(tmp_path))
        assert f"no checkpoint in {tmp_path}/saved/run: starting a new run" in log.text

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ("filename_tmpl='last.pth'", "filename_tmpl must be a file name with one {}"),
            ("out_dir='s3://a'", "out_dir must be a local folder"),
        ],
    )
    def test_invalid_settings(self, setting, message, to_train):
        with pytest.raises(ValueError, match=f"^default_hooks.checkpoint.{message}"):
            to_train(settings=f"default_hooks = dict(checkpoint=dict({setting}))")

    def test_a_folder_that_cannot_be_written_is_an_error(self, config, tmp_path):
        (tmp_path / "saved").touch()
        config.write_text(CONFIG + OUT_DIR.format(tmp_path))
        arguments = [str(config), "--work-dir", str(tmp_path / "run")]
        args = program.training_parser("train", "").parse_args(arguments)
        message = f"^default_hooks.checkpoint.out_dir {tmp_path}/saved/run cannot be written: "
        with pytest.raises(OSError, match=message):
            program.run_training(args)


def test_a_base_in_a_missing_package_names_the_extra(config, monkeypatch):
    monkeypatch.setattr("mmengine.config.config.is_installed", lambda _: False)
    config.write_text("_base_ = 'mmdet::_base_/default_runtime.py'")
    message = r"small.py requires mmdet: pip install 'flash-internimage\[openmmlab\]'$"
    with pytest.raises(ValueError, match=message):
        program_config.read_config(config)
    config.write_text("_base_ = 'mmpose::_base_/default_runtime.py'")
    with pytest.raises(ValueError, match="cannot be read: ModuleNotFoundError: mmpose is not inst"):
        program_config.read_config(config)


def test_scaling_requires_the_base_batch_size(to_train):
    for settings in ("", "auto_scale_lr = dict(enable=False)"):
        with pytest.raises(ValueError, match=r"requires auto_scale_lr\.base_batch_size"):
            to_train("--auto-scale-lr", settings=settings)
    cfg = to_train("--auto-scale-lr", settings="auto_scale_lr = dict(base_batch_size=16)")
    assert cfg.auto_scale_lr == {"base_batch_size": 16, "enable": True}


def to_evaluate(config: Path, *options: str) -> Config:
    parser = evaluation_parser("test", "")
    return evaluation_config(parser.parse_args([str(config), "c.pth", *options]))


def test_an_evaluation_drops_the_settings_of_the_training(config):
    cfg = to_evaluate(config)
    given = {name for name, value in cfg.items() if value is not None}
    assert {name for name in given if name.startswith(("train_", "val_", "optim"))} == set()
    assert cfg.test_dataloader == {"batch_size": 2}
    assert cfg.load_from == "c.pth"


@pytest.mark.parametrize("kind", ["EarlyStoppingHook", "mmengine.EarlyStoppingHook"])
def test_an_evaluation_drops_early_stopping(kind, config):
    settings = f"custom_hooks = [dict(type='{kind}', monitor='a'), dict(type='EMAHook')]\n"
    config.write_text(CONFIG + settings)
    assert hooks(to_evaluate(config)) == ["EMAHook"]


def test_work_folder(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert to_evaluate(config).work_dir == "output/small"
    config.write_text(f"{CONFIG}work_dir = 'elsewhere'")
    assert to_evaluate(config).work_dir == "elsewhere"
    assert to_evaluate(config, "--work-dir", "here").work_dir == "here"


def test_launcher(config, monkeypatch):
    assert to_evaluate(config).launcher == "none"
    assert to_evaluate(config, "--launcher", "slurm").launcher == "slurm"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # set by torchrun
    assert to_evaluate(config).launcher == "pytorch"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "optim_wraper.lr",
            r"unknown key optim_wraper; did you mean optim_wrapper\?",
        ),
        ("zzz", "unknown key zzz$"),
        ("weights", r"weights is a variable of .*small\.py that has already been resolved"),
    ],
)
def test_options_without_effect_are_errors(config, option, message):
    with pytest.raises(ValueError, match=rf"--cfg-options {option}: {message}"):
        to_evaluate(config, "--cfg-options", f"{option}=1")


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ("trian_cfg = dict(max_epochs=2)", "trian_cfg; did you mean train_cfg"),
        ("load_form = 'a.pth'", "load_form; did you mean load_from"),
        ("default_hook = dict()", "default_hook; did you mean default_hooks"),
    ],
)
def test_misspelt_settings_of_a_config_are_errors(config, settings, hint):
    config.write_text(f"{CONFIG}{settings}\n")
    with pytest.raises(ValueError, match=rf"small\.py: unknown key {hint}\?"):
        to_evaluate(config)


def test_variables_of_a_config_are_not_misspelt_settings(config):
    names = "train_pipeline", "test_pipeline", "val_pipeline", "data_root", "loader", "dataset"
    config.write_text(CONFIG + "".join(f"{name} = 1\n" for name in names))
    assert to_evaluate(config).loader == 1


def test_options_before_the_config_are_an_error(config, capsys):
    parser = evaluation_parser("test", "")
    with pytest.raises(SystemExit):
        parser.parse_args(["--cfg-options", "a=1", str(config), "c.pth"])
    assert f"must be KEY=VALUE, got {config}; CONFIG comes first" in capsys.readouterr().err


def test_options(config):
    options = ["test_dataloader.batch_size=3", "find_unused_parameters=True"]
    cfg = to_evaluate(config, "--cfg-options", *options)
    assert (cfg.test_dataloader.batch_size, cfg.find_unused_parameters) == (3, True)


def wrapped(*roots: str) -> dict:
    parts = [{"ann_file": f"{i}.json", "data_root": root} for i, root in enumerate(roots)]
    joined = {"type": "ConcatDataset", "datasets": parts}
    return {"type": "RepeatDataset", "times": 1, "dataset": joined}


def test_another_root_is_that_of_all_joined_datasets(config):
    cfg = to_evaluate(config)
    cfg.test_dataloader = {"dataset": wrapped("data/", "data")}
    cfg.test_evaluator = [{"type": "A"}, {"type": "B", "ann_file": "data/both.json"}]
    move_data(cfg, Path("/copy"))
    joined = cfg.test_dataloader.dataset.dataset.datasets
    assert [part.data_root for part in joined] == ["/copy/", "/copy/"]
    assert cfg.test_evaluator[1]["ann_file"] == "/copy/both.json"


@pytest.mark.parametrize(
    ("roots", "ann_file", "message"),
    [
        (
            ("a/", "b/"),
            "a/both.json",
            "--data must be left out for .* of several roots, a, b, got",
        ),
        (("a", "a"), "both.json", "ann_file must be below data_root=a for --data, got both.json"),
    ],
)
def test_another_root_that_is_ambiguous_is_an_error(config, roots, ann_file, message):
    cfg = to_evaluate(config)
    cfg.test_dataloader = {"dataset": wrapped(*roots)}
    cfg.test_evaluator = {"ann_file": ann_file}
    with pytest.raises(ValueError, match=message):
        move_data(cfg, Path("/copy"))


def test_several_scales_reach_joined_datasets(config):
    cfg = to_evaluate(config)
    cfg.test_dataloader = {"dataset": wrapped("a", "a")}
    cfg.merge_from_dict({"tta_pipeline": [{"type": "X"}], "tta_model": {"type": "Y"}})
    prepare_evaluation(cfg, "c.pth", tta=True)
    wrapper = cfg.test_dataloader.dataset
    assert "pipeline" not in wrapper
    assert [part.pipeline[0].type for part in wrapper.dataset.datasets] == ["X", "X"]


class TestEndingTogether:
    @pytest.fixture(autouse=True)
    def process_group(self, tmp_path) -> Iterator[None]:
        store = dist.FileStore(str(tmp_path / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        yield
        if dist.is_initialized():
            dist.destroy_process_group()

    def test_processes_wait_for_each_other_before_they_disconnect(self, monkeypatch):
        initialized = []
        monkeypatch.setattr(dist, "barrier", lambda: initialized.append(dist.is_initialized()))
        with ending_together():
            pass
        assert initialized == [True]
        assert not dist.is_initialized()

    def test_a_process_with_an_error_does_not_wait(self, monkeypatch):
        monkeypatch.setattr(dist, "barrier", pytest.fail)
        with pytest.raises(ValueError, match="wrong"), ending_together():
            raise ValueError("wrong")
