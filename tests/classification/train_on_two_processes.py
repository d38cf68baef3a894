"""Run classification.train as one of two processes, and compare their weights at every save.

Prints the type of the error that this process raises when the second one fails, and the exit codes
of a run and of a run that the first process rejects.
"""

import os
import sys
from collections.abc import Callable

import torch

from flash_internimage.classification.cli.train import main
from flash_internimage.classification.engine import Trainer
from flash_internimage.classification.processes import fail_together, gather, rank

fates = set()


def fail_on_the_second(device: torch.device) -> None:
    try:
        with fail_together(device):
            if rank() == 1:
                raise ZeroDivisionError
    except Exception as error:
        fates.add(type(error).__name__)


def compared(method: Callable) -> Callable:
    def run(self: Trainer, *args):
        fail_on_the_second(self.device)
        for model in (self.model, self.ema.module):
            ours = model.state_dict()
            for theirs in gather(ours):
                assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
        return method(self, *args)

    return run


Trainer.save = compared(Trainer.save)
Trainer.validate_epoch = compared(Trainer.validate_epoch)
codes = [main([*sys.argv[1:], "--resume", "auto"])]
os.environ["MASTER_PORT"] = os.environ["SECOND_PORT"]  # The first port may still be in use.
codes.append(main(sys.argv[1:]))
sys.stdout.write(f"{fates} {codes}\n")
