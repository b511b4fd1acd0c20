"""An extension that DeepSpeed compiles when it starts on CPUs, and training never calls."""

from __future__ import annotations

from importlib.util import find_spec


def skip_inference_reduce() -> None:
    """Turn off DeepSpeed's all-reduce in shared memory; call it before DeepSpeed starts its process group.

    Only its inference calls it. It needs ninja and a C++ compiler on the path, waits forever once a build was killed,
    and leaves 69 MB a process in /dev/shm.
    """
    if find_spec("deepspeed") is None:
        return
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
