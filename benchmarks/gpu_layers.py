"""Every layer on a GPU beside its twin on the CPU, and every sparse form of a pruned layer beside the dense one.

    python benchmarks/gpu_layers.py             # results/gpu_layers.json; under a minute

1. Each class of ``gracile.models.layers``: the same weights, input and gradient on both devices in fp32; the largest
   relative distance of the output and of each parameter's gradient.
2. A linear layer of LLaMA-1B's MLP, pruned to 2:4, to blocks and to equal rows, in every form that holds it: how far
   its output is from the dense product in fp64, and milliseconds on 4096 tokens.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gracile.models import layers, sparse_export

KEYS: dict[str, dict[str, Any]] = {
    **{name: {"sparsity": 0.75} for name in ("DopedLinear", "FactorisedLinear", "ParallelLinear")},
    **{name: {"rank": 16} for name in ("LowRankLinear", "ReLoRALinear", "SparseLowRankLinear", "SpectralLinear")},
}
IN, OUT, TOKENS = 256, 192, 64
LONG, SHORT = 5504, 2048  # of LLaMA-1B, where blocks of 32 divide


def classes() -> dict[str, Any]:
    found = {name: getattr(layers, name) for name in layers.__all__}
    trained = {n: c for n, c in found.items() if isinstance(c, type) and issubclass(c, layers.FactoredLinear)}
    return {
        n: c
        for n, c in trained.items()
        if c is not layers.FactoredLinear and not inspect.isabstract(c) and not issubclass(c, layers.InferenceLinear)
    }


def run(layer: nn.Module, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, towards = (torch.randn(TOKENS, size, generator=generator).to(device) for size in (IN, OUT))
    x.requires_grad_()
    y = layer(x)
    y.backward(towards)
    grads = [p.grad for p in layer.parameters() if p.grad is not None]
    return [t.detach().cpu().double() for t in (y, x.grad, *grads) if t is not None]


def twins(cls: Any) -> float | str:
    try:
        torch.manual_seed(0)
        host = cls.from_linear(nn.Linear(IN, OUT), **KEYS.get(cls.__name__, {}))
        held = copy.deepcopy(host).cuda()
        pairs = zip(run(host, "cpu"), run(held, "cuda"), strict=True)
        return max(float((a - b).norm() / a.norm().clamp_min(1e-30)) for a, b in pairs)
    except Exception as error:  # the others are still to be seen
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def pruned(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(LONG, SHORT, generator=generator)
    if kind == "2:4":
        groups = W.abs().view(LONG, -1, 4)
        return W * (groups >= groups.topk(2).values[..., -1:]).view_as(W)
    if kind == "blocks of 32, a fifth kept":
        kept = torch.rand(LONG // 32, SHORT // 32, generator=generator) < 0.2
        return W * kept.repeat_interleave(32, 0).repeat_interleave(32, 1)
    return W * (W.abs() >= W.abs().topk(SHORT // 10).values[:, -1:])


def forms(kind: str, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    linear = nn.Linear(SHORT, LONG, bias=False)
    linear.weight.data = pruned(kind)
    exact = linear.weight.double().cuda()
    linear = linear.to("cuda", dtype)
    made = sparse_export.candidates(linear)
    x = torch.randn(128, SHORT, device="cuda", dtype=dtype)
    wanted = x.double() @ exact.t()
    times = sparse_export.medians({"it": made}, 4096)["it"]
    told = {}
    for name, layer in made.items():
        with torch.inference_mode():
            off = float((layer(x).double() - wanted).norm() / wanted.norm())
        told[name] = {"off": off, "ms": times[name]}
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gpu_layers.json")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_layers.py needs a CUDA device: torch sees none")
    told: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    told["layers"] = {name: twins(cls) for name, cls in classes().items()}
    told["forms"] = {}
    for kind in ("2:4", "blocks of 32, a fifth kept", "a tenth of each row kept"):
        try:
            told["forms"][kind] = forms(kind, torch.bfloat16)
        except Exception as error:  # the others are still to be seen
            told["forms"][kind] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    options.output.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
