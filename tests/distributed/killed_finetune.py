"""``gracile finetune`` whose first process is killed, as by SIGKILL from outside, in the step that the last word says.

torchrun --nproc-per-node 2 killed_finetune.py CONFIG.yaml [--key value ...] STEP
"""

import os
import signal
import sys

from gracile.train.engines.process_exit import leave
from gracile.train.finetune import main
from gracile.train.run.finetune_trainer import FinetuneTrainer


def kill_in(step: int) -> None:
    usual = FinetuneTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step and self.args.process_index == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return usual(self, *args, **kwargs)

    FinetuneTrainer.training_step = training_step


if __name__ == "__main__":
    kill_in(int(sys.argv[-1]))
    leave(main(sys.argv[1:-1]))
