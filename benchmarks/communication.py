"""Optimizer state and traffic of one process, when the layers of a LLaMA are split over many; beside dense AdamW.

    python benchmarks/communication.py --size 7b --rank 1024

The processes are not there: torch's fake process group runs one of them, whose collectives move nothing, on real
tensors of its share of one layer. Bytes are counted as they would be sent; times would mean nothing. Real processes
send the same: ``tests/distributed/matrix.py`` counts them.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from gracile import optim
from gracile.models import SIZES
from gracile.train.measurement.comm_bytes import Traffic

MIB = 2**20
GAP = 4
CONTENDERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {}),
    "GaLoreAdamW": (optim.GaLoreAdamW, {"shard_basis": False}),
    "GaLoreAdamW, shard_basis": (optim.GaLoreAdamW, {"shard_basis": True}),
    "GaLoreAdamW8bit, shard_basis": (optim.GaLoreAdamW8bit, {"shard_basis": True}),
    "FiraAdamW, shard_basis": (optim.FiraAdamW, {"shard_basis": True}),
    "APOLLOAdamW": (optim.APOLLOAdamW, {}),
    "DCTAdamW": (optim.DCTAdamW, {}),
    "LDAdamW, shard_basis": (optim.LDAdamW, {"shard_basis": True}),
}


def layer(size: str) -> list[tuple[int, int]]:
    h, f = SIZES[size]["hidden_size"], SIZES[size]["intermediate_size"]
    return [(h, h)] * 4 + [(f, h)] * 2 + [(h, f)]


def share(shape: tuple[int, int], mesh: Any, seed: int) -> DTensor:
    """The first process's rows of a matrix, as FSDP2 and ZeRO 3 cut it."""
    rows = -(-shape[0] // mesh.size())
    local = 0.02 * torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(seed))
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=(shape[1], 1))


def measure(name: str, size: str, rank: int, processes: int, proj_type: str) -> dict[str, Any]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    mesh = init_device_mesh("cpu", (processes,))
    cls, keys = CONTENDERS[name]
    parameters = [nn.Parameter(share(shape, mesh, i)) for i, shape in enumerate(layer(size))]
    if cls is not torch.optim.AdamW:
        gap = {} if cls is optim.LDAdamW else {"update_proj_gap": GAP}
        optimizer = cls([{"params": parameters, "rank": rank, "proj_type": proj_type, **gap, **keys}], lr=1e-3)
    else:
        optimizer = cls(parameters, lr=1e-3)
    sent = []
    for step in range(GAP + 1):
        for i, (p, shape) in enumerate(zip(parameters, layer(size), strict=True)):
            p.grad = share(shape, mesh, 100 * step + i)
        with Traffic() as traffic:
            optimizer.step()
        sent.append(traffic.bytes)
    state = sum(
        (v.to_local() if isinstance(v, DTensor) else v).nbytes for s in optimizer.state.values() for v in s.values()
    )
    dist.destroy_process_group()
    layers = SIZES[size]["num_hidden_layers"]
    return {
        "optimizer": name, "side": proj_type, "processes": processes, "state": layers * state,
        "sent": layers * sent[1], "sent_at_refresh": layers * (sent[GAP] - sent[1]),
    }  # fmt: skip


def engine_bytes(size: str, processes: int) -> int:
    """What the engine sends in a step for the same matrices in bf16: gradients scattered, weights gathered twice."""
    numel = SIZES[size]["num_hidden_layers"] * sum(m * n for m, n in layer(size))
    return round(6 * numel * (processes - 1) / processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="7b", choices=SIZES)
    parser.add_argument("--rank", type=int, default=1024)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 8, 64])
    parser.add_argument("--sides", nargs="+", default=["right", "std"])
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore", message="a gradient was not finite")  # nothing comes from processes that are none
    rows = []
    print(f"{chosen.size}, rank {chosen.rank}: MiB on one process\n")
    print("| processes | optimizer | side | state | of AdamW's | sent a step | and at a refresh | of the engine's |")
    print("|---|---|---|---|---|---|---|---|")
    for processes in chosen.processes:
        engine, dense = engine_bytes(chosen.size, processes), None
        for name in CONTENDERS:
            for side in chosen.sides if name != "AdamW" else ["-"]:
                told = measure(name, chosen.size, chosen.rank, processes, side)
                dense = dense or told["state"]
                rows.append(told)
                state, sent, refresh = (told[key] / MIB for key in ("state", "sent", "sent_at_refresh"))
                shares = told["state"] / dense, told["sent"] / engine
                print(
                    f"| {processes} | {name} | {side} | {state:,.0f} | {shares[0]:.2f} | {sent:,.1f} | {refresh:,.1f} "
                    f"| {shares[1]:.3f} |",
                    flush=True,
                )
    if chosen.out:
        chosen.out.write_text(json.dumps({"size": chosen.size, "rank": chosen.rank, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
