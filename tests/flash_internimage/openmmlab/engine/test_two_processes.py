"""Test batch norm and early stopping in training on two processes."""

import torch
import torch.distributed as dist
from mmengine.model import BaseModel
from torch import nn

from flash_internimage.openmmlab import SafeRunner
from flash_internimage.openmmlab.safe_loading import read_checkpoint
from tests.flash_internimage.openmmlab.small import Score
from tests.processes import CONTEXT


class Normalized(BaseModel):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3, momentum=0.5)

    def forward(self, inputs, mode="tensor"):
        if mode != "loss":
            # Validation uses these statistics.
            self.validated = self.norm.running_mean.tolist()
        out = self.norm(torch.stack(inputs))
        return {"loss": (out - 1).square().mean()} if mode == "loss" else list(out)


def _train(rank: int, folder: str, queue) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = Normalized()
    loader = {
        "dataset": [{"inputs": torch.full((3,), float(i**2))} for i in range(8)],
        "batch_size": 2,
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "num_workers": 0,
    }
    hook = {"type": "AtomicCheckpointHook", "by_epoch": False, "interval": 2}
    SafeRunner(
        model,
        f"{folder}/run",
        train_dataloader=loader,
        val_dataloader=loader,
        train_cfg={"by_epoch": False, "max_iters": 4, "val_interval": 4},
        val_cfg={},
        val_evaluator={"type": Score, "scores": [0.1]},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.01}},
        default_hooks={"checkpoint": hook},
        custom_hooks=[{"type": "EMAHook"}],
        launcher="pytorch",
        log_level="WARNING",
    ).train()
    epochs = [_train_until_stopped(rank, f"{folder}/stopped", loader, first) for first in (0, 2)]
    queue.put((rank, model.validated, model.norm.running_mean.tolist(), epochs))
    dist.barrier()
    dist.destroy_process_group()


def _train_until_stopped(rank: int, folder: str, loader: dict, first: int) -> int:
    """Train two epochs, or resume after them, and return the epoch."""
    scores = [0.5, 0.4, 0.4, 0.9] if rank == 0 else [0.1, 0.2, 0.3, 0.4]
    stopping = {"type": "ResumableEarlyStoppingHook", "monitor": "score", "rule": "greater"}
    runner = SafeRunner(
        Normalized(),
        folder,
        train_dataloader=loader,
        val_dataloader=loader,
        train_cfg={"by_epoch": True, "max_epochs": 4 if first else 2},
        val_cfg={},
        val_evaluator={"type": Score, "scores": scores[first:]},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.01}},
        default_hooks={"checkpoint": {"type": "AtomicCheckpointHook", "interval": 1}},
        custom_hooks=[{**stopping, "patience": 2, "min_delta": 0.0}],
        launcher="pytorch",
        log_level="WARNING",
        experiment_name=f"stopped_{first}",
        **({"resume": True, "load_from": f"{folder}/epoch_{first}.pth"} if first else {}),
    )
    runner.train()
    return runner.epoch


def test_processes_agree_on_statistics_and_on_the_epoch_to_stop_at(tmp_path):
    queue = CONTEXT.SimpleQueue()
    processes = [CONTEXT.Process(target=_train, args=(i, str(tmp_path), queue)) for i in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    results = {rank: values for rank, *values in (queue.get(), queue.get())}
    assert results[0] == results[1]
    assert results[0][2] == [2, 3]
    for name in ("iter_2.pth", "iter_4.pth"):
        checkpoint = read_checkpoint(tmp_path / "run" / name)
        averaged = checkpoint["state_dict"]["norm.running_mean"]
        trained = checkpoint["ema_state_dict"]["module.norm.running_mean"]
        assert torch.equal(averaged, trained)
    assert averaged.tolist() == results[0][0]
