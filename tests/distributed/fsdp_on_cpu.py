"""``gracile pretrain`` or ``finetune`` under FSDP2 on CPUs, for tests: accelerate splits nothing there by itself.

    torchrun --nproc-per-node 2 fsdp_on_cpu.py [finetune] CONFIG.yaml [--key value ...]

accelerate 1.15 turns FSDP on for a list of kinds of devices that lacks CPUs. torch itself splits on them. A line is
printed where a pass leaves whole gradients for a later one to sum.
"""

import sys

from accelerate.state import DistributedType, PartialState
from torch.distributed.fsdp import FSDPModule


def split_on_cpus() -> None:
    """Processes on CPUs pass for processes on GPUs where it is decided whether FSDP is on."""
    init = PartialState.__init__

    def passing(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = passing


def tell_of_deferred_sums() -> None:
    given = FSDPModule.set_requires_gradient_sync

    def told(self, requires, **keywords):
        if not requires:
            print("gradients are summed in a later pass", flush=True)
        given(self, requires, **keywords)

    FSDPModule.set_requires_gradient_sync = told


if __name__ == "__main__":
    from gracile.train import finetune, pretrain
    from gracile.train.engines.process_exit import leave

    split_on_cpus()
    tell_of_deferred_sums()
    tunes = sys.argv[1:2] == ["finetune"]
    leave(finetune.main(sys.argv[2:]) if tunes else pretrain.main())
