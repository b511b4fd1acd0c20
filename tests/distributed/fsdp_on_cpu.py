"""``gracile pretrain`` or ``finetune`` under FSDP2 on CPUs, for tests: accelerate splits nothing there by itself.

    torchrun --nproc-per-node 2 fsdp_on_cpu.py [finetune] CONFIG.yaml [--key value ...]

accelerate 1.15 turns FSDP on for a list of kinds of devices that lacks CPUs. torch itself splits on them.
"""

import sys

from accelerate.state import DistributedType, PartialState


def split_on_cpus() -> None:
    """Processes on CPUs pass for processes on GPUs where it is decided whether FSDP is on."""
    init = PartialState.__init__

    def passing(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = passing


if __name__ == "__main__":
    from gracile.train import finetune, pretrain
    from gracile.train.engines.process_exit import leave

    split_on_cpus()
    tunes = sys.argv[1:2] == ["finetune"]
    leave(finetune.main(sys.argv[2:]) if tunes else pretrain.main())
