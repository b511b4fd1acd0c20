"""One process, DDP, FSDP2 and DeepSpeed: how a run is split, and what each engine needs."""
