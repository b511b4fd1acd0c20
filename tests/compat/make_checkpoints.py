"""What the optimizers and layers of version 0.1.0 (commit a77f93a) save and compute, as small files.

The files in ``data`` were written once, by that version, with torch 2.13 on CPUs:

    PYTHONPATH=<the source of a77f93a> OMP_NUM_THREADS=1 python make_checkpoints.py

They are not to be written anew by a later version: ``test_compat.py`` and ``test_compat_distributed.py`` read them, to
see that what was saved then is loaded, gone on from and computed as it was. But for ``export``, only public names of
gracile are used.

A case is a class in ``optim.__all__`` with some options. It takes SAVED steps, with a refresh or a change of masks at
step 4; its weights, ``state_dict()`` and ``full_state`` are kept, and the weights after MORE steps, with a refresh at
step 8: of the run that went on, and of one that took the full state over. Gradients are drawn from seeds, or are those
of a small model where layers belong to the method. Names of files are those of the classes. What is long (LONG) and
only compared is kept as its digest and some of its elements. Runs on two processes are those of ``worker.py``.

With ``--single`` those on two processes are left as they are. With ``--steps`` nothing is written but ``steps.pt``, of
what is in 8 bits on two processes, made by that version on another CPU: its first steps, from the start and from what
is recorded, and the weights of its whole runs.
"""

import hashlib
import io
import lzma
import os
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import gracile
from gracile import optim
from gracile.models import layers
from gracile.models.convert import convert

COMMIT, VERSION = "a77f93a", "0.1.0"
DATA = Path(__file__).with_name("data")
PAIR, EXPORTED = "two_processes.tar.xz", "exported.tar.xz"
STEPS = "first", "next"
SAVED, MORE = 6, 5
LONG = 2000  # elements

SIDES = {"tall": (20, 12), "wide": (12, 20), "square": (12, 12)}
LONG_SIDES = {"long": (5, 1030)}  # moments of 4120 elements at rank 4: 8 bits really
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Case(NamedTuple):
    """``keys`` are the constructor's, ``of_matrices`` those of the groups of matrices. With a ``layer``, a small model
    with such layers is trained. ``like`` tells how close weights are where arithmetic is another."""

    cls: type[torch.optim.Optimizer]
    keys: dict[str, Any]
    of_matrices: dict[str, Any] | None = None
    layer: type[nn.Module] | None = None
    of_layer: dict[str, Any] | None = None
    dtype: str = "fp32"
    sides: dict[str, tuple[int, int]] = SIDES
    plain: tuple[tuple[int, ...], ...] = ()  # further parameters without a rank
    finish: bool = False  # call finish() before the last steps
    near: float = 1e-5


RANKED = {"rank": 4, "update_proj_gap": 4, "weight_decay": 0.1}
ADAFACTOR = {"lr": 0.05, "relative_step": False, "scale_parameter": False}
MASKED = {"lr": 0.05, "update_every": 4, "drop_fraction": 0.3, "t_end": 30}
HALF = {"sparsity": 0.5, "weight_decay": 0.1}
PATTERN = {"n": 2, "m": 4}
CAST = {"lr": 0.01, "n": None, "total_steps": SAVED + MORE - 1, "lam": 0.05}
SQUEEZED = {"lr": 0.05, "hs_lambda": 3e-3, "interval": 3, "warmup_steps": 1, "quantile_every": 4}
ENVELOPED = {"lr": 0.05, "wgsef_lambda": 0.05, "ramp_steps": 4}
SPARSE_LOW_RANK = {"rank": 4, "density": 0.1}
SST = {"lr": 0.02, "swap_every": 4, "iterations": 2, "warmup_steps": 3}
LOOSE = 5e-3  # a last bit may decide over a step of an 8-bit code
BF16 = {"dtype": "bf16", "near": 1e-2}

OF_DCT = {"lr": 0.05, "rotate_subspace": True}  # the default of that version

CASES: dict[str, dict[str, Case]] = {
    "GaLoreAdamW": {
        "": Case(optim.GaLoreAdamW, {"lr": 0.1}, RANKED),
        "iterate": Case(optim.GaLoreAdamW, {"lr": 0.1}, RANKED | {"subspace_method": "iterate"}),
        "svd, reverse_std": Case(
            optim.GaLoreAdamW, {"lr": 0.1}, RANKED | {"subspace_method": "svd", "proj_type": "reverse_std"}
        ),
        "bf16": Case(optim.GaLoreAdamW, {"lr": 0.1}, RANKED, **BF16),
        "bf16 moments": Case(optim.GaLoreAdamW, {"lr": 0.1, "state_dtype": torch.bfloat16}, RANKED, near=1e-2),
    },
    "GaLoreAdamW8bit": {
        "": Case(optim.GaLoreAdamW8bit, {"lr": 0.1}, RANKED, sides=SIDES | LONG_SIDES, plain=((64, 65),), near=LOOSE),
        "quant": Case(
            optim.GaLoreAdamW8bit,
            {"lr": 0.1},
            RANKED | {"update_proj_gap": 3, "quant": True, "cos_threshold": 0.2, "queue_size": 1},  # at 0, 3 and 9
            near=LOOSE,
        ),
        "quant to 8 bits": Case(
            optim.GaLoreAdamW8bit,
            {"lr": 0.1},
            RANKED | {"quant": True, "quant_n_bit": 8, "quant_group_size": 16},
            near=LOOSE,
        ),
        "cos_threshold": Case(optim.GaLoreAdamW8bit, {"lr": 0.1}, RANKED | {"cos_threshold": 0.4, "gamma_proj": 3}),
    },
    "GaLoreAdafactor": {
        "": Case(optim.GaLoreAdafactor, ADAFACTOR, RANKED),
        "beta1, relative": Case(
            optim.GaLoreAdafactor, {"lr": 0.15, "relative_step": False, "beta1": 0.9}, RANKED | {"scale": 1.0}
        ),
    },
    "GaLoreLion": {"": Case(optim.GaLoreLion, {"lr": 0.02}, RANKED)},
    "FiraAdamW": {"": Case(optim.FiraAdamW, {"lr": 0.05}, RANKED)},
    "APOLLOAdamW": {
        "": Case(optim.APOLLOAdamW, {"lr": 0.05}, RANKED),
        "Mini": Case(optim.APOLLOAdamW, {"lr": 0.02}, RANKED | {"rank": 1, "scale_type": "tensor", "scale": 8.0}),
        "svd": Case(optim.APOLLOAdamW, {"lr": 0.05}, RANKED | {"proj": "svd"}),
        "bf16": Case(optim.APOLLOAdamW, {"lr": 0.05}, RANKED, **BF16),
    },
    "DCTAdamW": {
        "": Case(optim.DCTAdamW, OF_DCT, RANKED),
        "every step": Case(optim.DCTAdamW, OF_DCT, RANKED | {"update_proj_gap": 1}),
        "fp32": Case(optim.DCTAdamW, OF_DCT, RANKED | {"error_feedback": "fp32"}),
        "8bit": Case(optim.DCTAdamW, OF_DCT, RANKED | {"error_feedback": "8bit"}, near=LOOSE),
        "4bit": Case(optim.DCTAdamW, OF_DCT, RANKED | {"error_feedback": "4bit"}, near=5 * LOOSE),
    },
    "GaLorePlusAdamW": {
        "": Case(optim.GaLorePlusAdamW, {"lr": 0.1}, RANKED | {"residual_warmup": 3, "residual_fraction": 0.1}),
        "num_heads": Case(optim.GaLorePlusAdamW, {"lr": 0.1}, RANKED | {"num_heads": 2, "residual_warmup": 7}),
    },
    "GradNormLoRPAdamW": {"": Case(optim.GradNormLoRPAdamW, {"lr": 0.05}, RANKED)},
    "LDAdamW": {
        "": Case(optim.LDAdamW, {"lr": 0.05}, {"rank": 4, "weight_decay": 0.1}),
        "no feedback": Case(optim.LDAdamW, {"lr": 0.05}, {"rank": 4, "error_feedback": False}),
        "bf16": Case(optim.LDAdamW, {"lr": 0.05}, {"rank": 4}, **BF16),
    },
    "Lion": {
        "": Case(optim.Lion, {"lr": 0.02, "weight_decay": 0.1}, {}),
        "bf16": Case(optim.Lion, {"lr": 0.02}, {}, **BF16),
    },
    "SETAdamW": {
        "": Case(optim.SETAdamW, MASKED, HALF),
        "rescaled": Case(optim.SETAdamW, MASKED | {"rescale_init": True, "reinit_when_same": True, "seed": 3}, HALF),
    },
    "RigLAdamW": {
        "": Case(optim.RigLAdamW, MASKED, HALF),
        "bf16": Case(optim.RigLAdamW, MASKED, {"density": 0.4, "distribution": "uniform"}, **BF16),
        "lamp": Case(optim.RigLAdamW, MASKED, HALF | {"distribution": "lamp"}),
    },
    "SRigLAdamW": {"": Case(optim.SRigLAdamW, MASKED | {"gamma_sal": 0.9}, HALF | {"distribution": "uniform"})},
    "BlockSparseAdamW": {
        "": Case(optim.BlockSparseAdamW, MASKED | {"t_end": 9, "block_size": 4}, HALF),
        "at once": Case(optim.BlockSparseAdamW, MASKED | {"block_size": 2, "initial_sparsity": None}, HALF),
    },
    "SparseAdamW": {
        "": Case(optim.SparseAdamW, MASKED, HALF | {"distribution": "er"}),
        "momentum": Case(
            optim.SparseAdamW, MASKED | {"t_end": 9}, HALF | {"grow": "momentum", "initial_sparsity": 0.3}
        ),
        "random": Case(optim.SparseAdamW, MASKED | {"schedule": "cubic"}, HALF | {"drop": "random", "grow": "random"}),
        "global": Case(
            optim.SparseAdamW,
            MASKED,
            HALF | {"distribution": "global", "drop": "gradient_magnitude", "drop_lambda": 1.0},
        ),
        "block": Case(optim.SparseAdamW, MASKED, HALF | {"structure": "block", "block_size": 4}),
        "constant fan-in": Case(optim.SparseAdamW, MASKED, HALF | {"structure": "constant_fan_in"}),
    },
    "SRSTEAdamW": {
        "": Case(optim.SRSTEAdamW, {"lr": 0.05, "n": None}, PATTERN | {"sr_lambda": 0.1}),
        "decoupled": Case(optim.SRSTEAdamW, {"lr": 0.05, "n": None, "decoupled": True}, PATTERN),
        "layers": Case(optim.SRSTEAdamW, {"lr": 0.02, "n": None}, PATTERN, layers.NMLinear, PATTERN),
    },
    "CastAdamS": {
        "": Case(optim.CastAdamS, CAST, PATTERN | {"mask_every": 4}),
        "layers": Case(
            optim.CastAdamS, CAST, PATTERN | {"mask_every": 4}, layers.ScaledLinear, PATTERN | {"pieces": 2}
        ),
    },
    "HyperSparseAdamW": {
        "": Case(optim.HyperSparseAdamW, SQUEEZED | {"prune_at": 9}, {"sparsity": 0.4}),
        "pruned": Case(optim.HyperSparseAdamW, SQUEEZED | {"prune_at": 5}, {"sparsity": 0.4}),
        "finished": Case(optim.HyperSparseAdamW, SQUEEZED, {"sparsity": 0.4}, finish=True),
    },
    "WGSEFAdamW": {
        "": Case(optim.WGSEFAdamW, ENVELOPED | {"finish_at": 9}, {"keep": 0.6}),
        "columns": Case(optim.WGSEFAdamW, ENVELOPED | {"finish_at": 5, "groups": "columns"}, {"keep": 0.6}),
        "blocks": Case(optim.WGSEFAdamW, ENVELOPED | {"groups": "blocks", "block_size": 4}, {"keep": 0.6}),
    },
    "SLTrainAdamW": {"": Case(optim.SLTrainAdamW, {"lr": 0.02}, None, layers.SparseLowRankLinear, SPARSE_LOW_RANK)},
    "SLTrainAdamW8bit": {
        "": Case(
            optim.SLTrainAdamW8bit,
            {"lr": 0.02},
            None,
            layers.SparseLowRankLinear,
            {"rank": 4, "density": 0.02},
            sides={"first": (12, 1030), "second": (9, 12)},
            near=LOOSE,
        )
    },
    "SSTAdamW": {
        "": Case(optim.SSTAdamW, SST, None, layers.SpectralLinear, {"rank": 4}),
        "bf16": Case(optim.SSTAdamW, SST, None, layers.SpectralLinear, {"rank": 4}, **BF16),
    },
    "ReLoRAAdamW": {
        "": Case(optim.ReLoRAAdamW, {"lr": 0.02, "merge_every": 4}, None, layers.ReLoRALinear, {"rank": 4}),
        **{
            reset: Case(
                optim.ReLoRAAdamW,
                {"lr": 0.02, "merge_every": 4, "reset_every": 3, "reset": reset, "reset_step": False},
                None,
                layers.ReLoRALinear,
                {"rank": 4, "alpha": 8.0, "seed": 3},
            )
            for reset in ("random", "magnitude")
        },
    },
}


# ---- one run --------------------------------------------------------------------------------------------------------


class Matrices(nn.Module):
    """Matrices and a vector, without a model around them: their gradients are drawn."""

    def __init__(self, case, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes = case.sides | {"vector": (12,)} | {f"plain{i}": shape for i, shape in enumerate(case.plain)}
        for name, shape in shapes.items():
            drawn = 0.3 * torch.randn(shape, generator=generator)
            self.register_parameter(name, nn.Parameter(drawn.to(DTYPES[case.dtype])))

    def groups(self, case):
        """Two groups of matrices, the second of the square one alone, and the rest."""
        chosen = [[self.get_parameter(name) for name in case.sides if (name == "square") == alone] for alone in (0, 1)]
        rest = [p for name, p in self.named_parameters() if name not in case.sides]
        return [*({"params": lot, **case.of_matrices} for lot in chosen), {"params": rest}]

    def give_gradients(self, t):
        """A part of them stays, so that subspaces overlap."""
        staying, noise = torch.Generator().manual_seed(7), torch.Generator().manual_seed(1000 + t)
        for p in self.parameters():
            G = 2 * torch.randn(p.shape, generator=staying) + torch.randn(p.shape, generator=noise)
            p.grad = (0.1 * G).to(p.dtype)


class Model(nn.Module):
    """Two linear layers, which are converted, and a norm."""

    def __init__(self, case, seed):
        super().__init__()
        torch.manual_seed(seed)
        first, second = (list(case.sides.values()) * 2)[:2]
        self.first, self.second = nn.Linear(first[1], first[0]), nn.Linear(second[1], second[0], bias=False)
        self.norm = nn.LayerNorm(second[0])
        self.to(DTYPES[case.dtype])
        convert(self, case.layer, ["first", "second"], **case.of_layer)

    def groups(self, case):
        return optim.param_groups(self, None, ["first", "second"], weight_decay=0.1, **case.of_matrices or {})

    def forward(self, x):
        return self.norm(self.second(torch.tanh(self.first(x))))

    def give_gradients(self, t):
        self.zero_grad()
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(16, self.first.in_features, generator=generator)
        target = torch.randn(16, self.second.out_features, generator=generator)
        y = self(x.to(self.norm.weight.dtype))
        (y - target.to(y.dtype)).square().mean().backward()


def built(case, seed=0):
    """A model and its optimizer."""
    model = (Matrices if case.layer is None else Model)(case, seed)
    return model, case.cls(model.groups(case), **case.keys)


def advance(model, optimizer, first, last):
    for t in range(first, last):
        model.give_gradients(t)
        optimizer.step()


def go_on(model, optimizer, case):
    """The weights after the last steps."""
    if case.finish:
        optimizer.finish()
    advance(model, optimizer, SAVED, SAVED + MORE)
    return weights_of(model)


def weights_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def put(model, weights):
    """Weights and buffers, into the very tensors that the optimizer holds."""
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            tensor.copy_(weights[name])


def taken_over(case, weights):
    """Another model, with these weights, and its optimizer."""
    model, optimizer = built(case, seed=1)
    put(model, weights)
    return model, optimizer


def at_save(case):
    """A run from the start, when it is saved."""
    model, optimizer = built(case)
    advance(model, optimizer, 0, SAVED)
    return model, optimizer


def saved_of(model, optimizer):
    return {
        "weights": weights_of(model),
        "state_dict": copied(optimizer.state_dict()),
        "full_state": optim.full_state(optimizer),
        "state_bytes": optim.state_bytes(optimizer),
    }


def recorded(case):
    model, optimizer = at_save(case)
    record = saved_of(model, optimizer)
    record["end"] = short(go_on(model, optimizer, case))
    model, optimizer = taken_over(case, record["weights"])
    optim.load_full_state(optimizer, copied(record["full_state"]))
    record["end_from_full"] = short(go_on(model, optimizer, case))
    return record


# ---- other things that are kept -------------------------------------------------------------------------------------

LAYERS = {
    "DopedLinear": {"sparsity": 0.9},
    "FactorisedLinear": {"sparsity": 0.5},
    "LowRankLinear": {"rank": 4},
    "NMLinear": PATTERN,
    "OrderedLowRankLinear": {},
    "ParallelLinear": {"sparsity": 0.5},
    "ReLoRALinear": {"rank": 4},
    "ScaledLinear": PATTERN,
    "SparseLowRankLinear": SPARSE_LOW_RANK,
    "SpectralLinear": {"rank": 4},
    "ThresholdLinear": {"s_init": -2.0},
}


def layer_of(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20))
    return convert(model, getattr(layers, name), ["0"], **LAYERS[name])


def layer_record(model):
    """What a layer saves, and what it computes: output, and the gradients of its parameters and its input."""
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(3)).requires_grad_()
    y = model(x)
    y.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"weights": weights_of(model), "output": y.detach(), "gradients": gradients | {"input": x.grad}}


def schedule_record():
    """The learning rates of JaggedCosineLR, and what it saves after SAVED steps."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = optim.JaggedCosineLR(optimizer, 20, 2, 6, restart_warmup_steps=3, min_ratio=0.2)
    rates, saved = [], {}
    for step in range(20):
        if step == SAVED:
            saved = {key: value for key, value in schedule.state_dict().items() if not callable(value)}
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return {"rates": rates, "saved": saved}


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 40}


def export(folder):
    """A small LLaMA whose layers are in all forms that CPUs have; ``sparse_export.load`` is what reads it. The names
    that write it are not public: a later version may have others."""
    from gracile.models import build_llama, sparse_export

    torch.manual_seed(0)
    model = build_llama("2m", num_attention_heads=2, **SIZES).eval()
    attention, gate = model.model.layers[0].self_attn, model.model.layers[0].mlp.gate_proj
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        order = torch.rand(32, 32, generator=generator).argsort(1)
        attention.q_proj.weight.mul_(order < 8)  # as many in each row: condensed
        gate.weight[32:] = 0
        gate.weight[16:32, 16:] = 0  # three blocks stay
        attention.v_proj.weight.mul_(torch.rand(32, 32, generator=generator) < 0.2)  # CSR
    for form in ("condensed", "blocks", "csr"):
        sparse_export.sparsify(model, form)
    sparse_export.save(model, folder)


def answers(folder):
    """What the exported model says, and what it consists of."""
    from gracile.models.sparse_export import load

    model = load(folder)
    tokens = torch.arange(24).view(2, 12) * 7 % SIZES["vocab_size"]
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    kinds = {name: type(module).__name__ for name, module in model.named_modules() if "_proj" in name}
    return {"logits": logits, "weights": weights_of(model), "kinds": kinds}


def fingerprint():
    """A digest of what this machine makes of some products and decompositions: where it agrees, so must all bits."""
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(24, 17, generator=generator) for _ in range(2))
    U, s, Vh = torch.linalg.svd(A, full_matrices=False)
    results = [A, A.T @ B, A.bfloat16() @ B.bfloat16().T, U, s, Vh, *torch.linalg.qr(A), *torch.linalg.eigh(A.T @ A)]
    results += [torch.linalg.svd(A.double()).U, torch.tanh(A), A.abs().sqrt(), A.abs().log(), A.norm(dim=0), A.sum()]
    long = torch.randn(64, 1030, generator=generator)
    results += [long @ long.T, long.square().sum(1), torch.linalg.vector_norm(long), long.exp(), long.cos()]
    return digest(torch.cat([result.float().flatten() for result in results]))


# ---- files ----------------------------------------------------------------------------------------------------------


def copied(nested):
    """Nested mappings and lists with tensors of their own."""
    return mapped(nested, lambda tensor: tensor.detach().clone())


def mapped(nested, function):
    if isinstance(nested, torch.Tensor):
        return function(nested)
    if isinstance(nested, dict):
        return {key: mapped(value, function) for key, value in nested.items()}
    if isinstance(nested, (list, tuple)):
        return type(nested)(mapped(value, function) for value in nested)
    return nested


def bits(tensor):
    """As whole numbers: NaN, which a state may hold before it has a value, is itself."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def digest(tensor):
    return hashlib.sha256(bits(tensor).numpy().tobytes()).hexdigest()[:24]


def short(tensors):
    """Long tensors as their digest and every eighth of their elements: enough to compare."""
    return {
        name: {"digest": digest(t), "some": t.reshape(-1)[::8].clone()} if t.numel() > LONG else t
        for name, t in tensors.items()
    }


def packed(nested):
    """The same, its tensors views of one tensor for each dtype, equal ones of the same place: a small file."""
    places, parts, lengths = {}, {}, {}

    def note(tensor):
        key = (tensor.dtype, digest(tensor))
        if key not in places:
            places[key] = lengths.get(tensor.dtype, 0)
            parts.setdefault(tensor.dtype, []).append(tensor.detach().reshape(-1))
            lengths[tensor.dtype] = places[key] + tensor.numel()
        return tensor

    mapped(nested, note)
    pools = {dtype: torch.cat(tensors) for dtype, tensors in parts.items()}

    def view(tensor):
        start = places[tensor.dtype, digest(tensor)]
        return pools[tensor.dtype][start : start + tensor.numel()].view(tensor.shape)

    return mapped(nested, view)


def write(name, record):
    torch.save(packed(record), DATA / f"{name}.pt")


def read(name):
    return copied(torch.load(DATA / f"{name}.pt", weights_only=True))


# ---- two processes --------------------------------------------------------------------------------------------------


def launched(*tasks, timeout=300):
    """``worker.py`` on two processes. When one fails, or in ``timeout`` seconds, both are gone, with all they started.

    Raises:
        RuntimeError: with what they said, where one fails.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(Path(__file__).with_name("worker.py")), *map(str, tasks)]
    of_both = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "WORLD_SIZE": "2"}  # DeepSpeed asks when it is imported
    of_both |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with tempfile.TemporaryFile("w+") as said:
        pipes = {"stdout": said, "stderr": said, "start_new_session": True}
        processes = []
        try:
            for rank in ("0", "1"):
                own = {**os.environ, **of_both, "RANK": rank, "LOCAL_RANK": rank}
                processes.append(subprocess.Popen(command, env=own, **pipes))
            _wait(processes, time.monotonic() + timeout)
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        codes = [process.returncode for process in processes]
        if any(codes):
            said.seek(0)
            raise RuntimeError(
                f"the processes ended with {codes} (-9: in {timeout} s they were not done)\n{said.read()[-4000:]}"
            )


def _wait(processes, until):
    """For all of them, for one that fails, or until that time."""
    codes = [None]
    while None in codes and not any(codes) and time.monotonic() < until:
        time.sleep(0.1)
        codes = [process.poll() for process in processes]


def pack(folder, name):
    """A folder, without what no one loads, as one file without owners and times."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name != "latest" and path.suffix != ".py":
                info = tarfile.TarInfo(str(path.relative_to(folder)))
                info.size = path.stat().st_size
                with path.open("rb") as content:
                    tar.addfile(info, content)
    (DATA / name).write_bytes(lzma.compress(stream.getvalue(), preset=9))


def unpack(name, folder):
    with tarfile.open(DATA / name) as tar:
        tar.extractall(folder, filter="data")
    return folder


def write_steps():
    with tempfile.TemporaryDirectory() as folder:
        recorded, found = unpack(PAIR, Path(folder, "recorded")), Path(folder, "found")
        launched("save", found, "resume", recorded)
        held = {kind: torch.load(found / f"{kind}.pt", weights_only=True) for kind in (*STEPS, "runs", "ends")}
    names = held["first"]
    runs = {name: {"weights": short(held["runs"][name]["weights"]), "end": held["runs"][name]["end"]} for name in names}
    whole = {"runs": runs, "ends": {name: held["ends"][name] for name in names}}
    write("steps", {kind: held[kind] for kind in STEPS} | whole | {"fingerprint": fingerprint()})


def main():
    torch.set_num_threads(1)
    assert gracile.__version__ == VERSION
    DATA.mkdir(exist_ok=True)
    if "--steps" in sys.argv:
        write_steps()
        return
    write(
        "about", {"commit": COMMIT, "version": VERSION, "torch": str(torch.__version__), "fingerprint": fingerprint()}
    )
    for name, cases in CASES.items():
        write(name, {variant: recorded(case) for variant, case in cases.items()})
    write("layers", {name: layer_record(layer_of(name)) for name in LAYERS})
    write("JaggedCosineLR", schedule_record())
    with tempfile.TemporaryDirectory() as folder:
        export(folder)
        pack(Path(folder), EXPORTED)
        write("exported", answers(folder))
    if "--single" not in sys.argv:
        with tempfile.TemporaryDirectory() as folder:
            launched("save", f"{folder}/saved")
            launched("resume", f"{folder}/saved")
            pack(Path(folder, "saved"), PAIR)


if __name__ == "__main__":
    main()
