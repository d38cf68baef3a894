"""Arguments and distributed processes, shared by all scripts."""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from mmengine.config import Config, DictAction
from mmengine.dist import init_dist
from mmengine.utils.dl_utils import set_multi_processing

from ..engine.runner.runner import SafeRunner

# The program that starts the processes of a launcher, and the variables that it sets.
_LAUNCHERS = {
    "pytorch": ("torchrun", ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")),
    "slurm": ("srun", ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_NODELIST")),
    "mpi": ("mpirun", ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MASTER_ADDR")),
}


class _Settings(DictAction):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Sequence[str],
        option_string: str | None = None,
    ) -> None:
        for value in values:
            if "=" not in value:
                parser.error(f"{option_string} must be KEY=VALUE, got {value}; CONFIG comes first")
        try:
            super().__call__(parser, namespace, values, option_string)
        except AssertionError as error:
            parser.error(f"{option_string}: {error}")


def base_parser(program: str, description: str) -> argparse.ArgumentParser:
    """Return an argument parser with the arguments that all scripts share."""
    parser = argparse.ArgumentParser(program, description=description)
    parser.add_argument("config", type=Path, help="config file, see configs/")
    parser.add_argument(
        "--work-dir",
        type=Path,
        help="folder of logs and checkpoints (default: output/<config name>)",
    )
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=_Settings,
        metavar="KEY=VALUE",
        help='override settings, e.g. optim_wrapper.optimizer.lr=1e-4 or "key=[a,b]"',
    )
    parser.add_argument(
        "--launcher",
        choices=("none", "pytorch", "slurm", "mpi"),
        help="how processes are started (default: pytorch under torchrun, otherwise none)",
    )
    return parser


def build_runner(cfg: Config) -> SafeRunner:
    """Build the runner of a config. Without GPUs, processes communicate through gloo."""
    start_processes(cfg)
    return SafeRunner.from_cfg(cfg)


def start_processes(cfg: Config) -> None:
    """Initialize distributed processes if the config has a launcher.

    Raises:
        ValueError: If the launcher's environment variables are not set.
    """
    if cfg.launcher == "none" or dist.is_initialized():
        return
    program, names = _LAUNCHERS[cfg.launcher]
    if missing := [name for name in names if name not in os.environ]:
        raise ValueError(
            f"--launcher {cfg.launcher} requires {program}, which sets environment variables: "
            f"{', '.join(missing)} is not set"
        )
    if cfg.launcher == "pytorch" and not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return
    env_cfg = cfg.get("env_cfg") or {}
    set_multi_processing(**env_cfg.get("mp_cfg", {}), distributed=True)
    init_dist(cfg.launcher, **env_cfg.get("dist_cfg", {}))


@contextmanager
def ending_together() -> Iterator[None]:
    """End distributed processes together, so that none closes connections that others still use.

    After an error, a process ends at once: the others may never reach the barrier.
    """
    yield
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
