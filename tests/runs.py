"""Run the training and test programs of detection and segmentation."""

from pathlib import Path
from types import ModuleType

from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flash_internimage.openmmlab.cli.train import training_parser, training_runner
from flash_internimage.openmmlab.visualization.detection import CaptionedDetVisualizer
from flash_internimage.openmmlab.visualization.segmentation import CaptionedSegVisualizer
from tests import processes
from tests.kills import run_until_killed


def _strings(arguments: tuple) -> list[str]:
    # Otherwise, images and scalars are written to the folder of this process's first run.
    for kind in (Visualizer, CaptionedDetVisualizer, CaptionedSegVisualizer):
        kind._instance_dict.clear()
    return [str(argument) for argument in arguments]


def train(*arguments) -> Runner:
    """Train with these arguments of the programs."""
    runner = training_runner(training_parser("train", "").parse_args(_strings(arguments)))
    runner.train()
    return runner


def evaluate(program: ModuleType, *arguments) -> dict[str, float]:
    """Return the metrics of detection.test or segmentation.test with these arguments."""
    args = program.get_parser().parse_args(_strings(arguments))
    return program.get_runner(args).test()


def tensorboard(folder: Path) -> dict[str, list[int]]:
    """Return the steps of each scalar that TensorBoard shows for a work folder."""
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {name: [e.step for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def log(folder: Path) -> str:
    """Read the logs of all attempts in a work folder."""
    return "".join(path.read_text() for path in sorted(folder.glob("*/*.log")))


def train_until_killed(task: str, config: Path, folder: Path) -> None:
    """Train in another process, and kill it after its first checkpoint."""
    run_until_killed(f"{task}.train", config, "--work-dir", folder, "--resume")


def train_with_two_processes(config: Path, folder: Path) -> None:
    command = ["-m", "flash_internimage", "train", config, "--work-dir", folder]
    for process in processes.run_distributed(*command):
        process.checked()
