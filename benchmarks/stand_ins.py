"""What a published training script expects and a machine may lack, while the script runs: a GPU, a hub, a logger.

Used by ``published_scripts.py``. All runs of a script have the same stand-ins, and none touches the arithmetic of an
optimizer. In one line each:

* torchrun: its environment variables for one process; ``init_process_group`` needs no port, and has gloo for nccl
* a GPU: tensors and modules that are sent to one stay on the CPU, ``torch.cuda`` answers, DDP has no device numbers
* the hub: C4 is passages of a local text, the t5-base tokenizer a BPE of that text
* wandb and loguru: take everything and say nothing; losses are read where ``backward`` starts
* older packages: ``generation_config`` of a model, two arguments of bitsandbytes
* SLTrain's C++ extension: built from the checkout
* the same first weights, where two layers draw them in another order
"""

from __future__ import annotations

import functools
import importlib.machinery
import inspect
import json
import os
import runpy
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass
class Run:
    """One run of one script.

    Attributes:
        script: the file, in a copy of the user's checkout.
        folder: where it is started.
        arguments: its command line.
        corpus: a folder with ``passages.json`` and ``tokenizer``.
        device: ``cpu``, or ``cuda`` for a machine that has what the script expects.
        launched: whether by torchrun.
        weights: where the first weights and the state of the random numbers are: written if the file is not there,
            taken if it is; None leaves a script its own.
        losses, keywords, error: what came of it: where each ``backward`` started, which keywords and group keys
            gracile's classes were given, and what the script ended with.
    """

    script: Path
    folder: Path
    arguments: list[str]
    corpus: Path
    device: str = "cpu"
    launched: bool = True
    weights: Path | None = None

    losses: list[float] = field(default_factory=list)
    keywords: set[str] = field(default_factory=set)
    error: str | None = None


def run(job: Run) -> Run:
    """Run a script to its end and say what became of its loss."""
    before = set(sys.modules)
    with ExitStack() as held:
        held.enter_context(stand_ins(job))
        held.callback(os.chdir, os.getcwd())
        os.chdir(job.folder)
        held.enter_context(patch.object(sys, "argv", [str(job.script), *job.arguments]))
        held.enter_context(patch.object(sys, "path", [str(job.script.parent), *sys.path]))
        try:
            runpy.run_path(str(job.script), run_name="__main__")
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            job.error = f"{type(error).__name__}: {' '.join(str(error).split())}"
    for name in set(sys.modules) - before:  # another script has modules of the same names
        if str(job.folder) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]
    return job


@contextmanager
def stand_ins(job: Run) -> Iterator[None]:
    """All of them, and what is written down of a run."""
    with ExitStack() as held:
        if job.launched:
            held.enter_context(patch.dict(os.environ, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}))
        if job.device == "cpu":
            held.enter_context(_OnCpu())
        for module in _modules(job):
            held.enter_context(_imported(module))
        for target, name, value in [*_replaced(job), *_written_down(job)]:
            held.enter_context(patch.object(target, name, value, create=True))
        yield
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


Replaced = Iterator[tuple[Any, str, Any]]  # where, what, by what


def _modules(job: Run) -> Iterator[types.ModuleType]:
    yield _wandb()
    yield _loguru()
    if (source := job.folder / "sparse-lora" / "sparse_linear.cpp").exists():
        yield _built(source, job.corpus)


def _replaced(job: Run) -> Replaced:
    yield torch.distributed, "init_process_group", functools.partial(_one_process, job.device)
    yield torch.nn.parallel, "DistributedDataParallel", _replicated(job)
    if job.device == "cpu":
        yield from _gpu_that_is_none()
    if "transformers" in sys.modules:
        yield from _from_the_hub(job)
    if "bitsandbytes" in sys.modules:
        yield from of_older_bitsandbytes()


@contextmanager
def _imported(module: types.ModuleType) -> Iterator[None]:
    """A module that ``import`` finds."""
    before = sys.modules.get(module.__name__)
    sys.modules[module.__name__] = module
    yield
    del sys.modules[module.__name__]
    if before is not None:
        sys.modules[module.__name__] = before


def _nothing(*_: Any, **__: Any) -> None:
    pass


# ---- one process and its device -------------------------------------------------------------------------------------


class _OnCpu(TorchFunctionMode):
    """Whatever is sent to a GPU, or made there, is on the CPU."""

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = tuple("cpu" if _is_cuda(x) else x for x in args)
        return func(*args, **{key: "cpu" if _is_cuda(x) else x for key, x in (kwargs or {}).items()})


def _is_cuda(x: object) -> bool:
    return (isinstance(x, str) and x.startswith("cuda")) or (isinstance(x, torch.device) and x.type == "cuda")


def _gpu_that_is_none() -> Replaced:
    for name in ("set_device", "synchronize", "reset_peak_memory_stats", "empty_cache"):
        yield torch.cuda, name, lambda *_: None
    yield torch.cuda, "is_bf16_supported", lambda *_: False
    yield torch.cuda, "current_device", lambda: 0
    yield torch.cuda, "max_memory_allocated", lambda *_: 0


def _one_process(device: str, *_: Any, **__: Any) -> None:
    backend = "gloo" if device == "cpu" else "nccl"
    torch.distributed.distributed_c10d.init_process_group(
        backend, store=torch.distributed.HashStore(), rank=0, world_size=1
    )


def _replicated(job: Run) -> type[torch.nn.parallel.DistributedDataParallel]:
    class Replicated(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, module: torch.nn.Module, **keywords: Any) -> None:
            if job.weights is not None:
                _same_start(module, job.weights)
            if job.device == "cpu":
                keywords = {k: v for k, v in keywords.items() if k not in ("device_ids", "output_device")}
            super().__init__(module, **keywords)

    return Replicated


THEIR_NAMES = {  # of a layer's tensors, in SLTrain's and ReLoRA's code
    "wrapped_model.": "",
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_A": "A",
    "lora_B": "B",
    "sparse_value": "values",
    "sparse_index": "support",
}


@torch.no_grad()
def _same_start(model: torch.nn.Module, file: Path) -> None:
    """The first weights of the first run that comes here, in every one."""
    if not file.exists():
        torch.save({"model": model.state_dict(), "random": torch.get_rng_state()}, file)
        return
    first = torch.load(file)
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    for theirs, value in first["model"].items():
        name = functools.reduce(lambda known, pair: known.replace(*pair), THEIR_NAMES.items(), theirs)
        held[name].copy_(value)
    torch.set_rng_state(first["random"])


# ---- hubs -----------------------------------------------------------------------------------------------------------


def _from_the_hub(job: Run) -> Replaced:
    import datasets
    import transformers

    yield datasets, "load_dataset", functools.partial(_passages, job)
    yield transformers.AutoTokenizer, "from_pretrained", functools.partial(_tokenizer, job)
    yield transformers.PreTrainedModel, "generation_config", types.SimpleNamespace()  # that older models had


def of_older_bitsandbytes() -> Replaced:
    """Two arguments by position that bitsandbytes has no longer: GaLore's and APOLLO's 8-bit classes give them, where
    they are taken for ``max_unorm`` and ``skip_zeros`` today, and matrices with small moments do not move at all."""
    from bitsandbytes.optim.optimizer import Optimizer2State

    init = Optimizer2State.__init__
    names = list(inspect.signature(init).parameters)
    if "percentile_clipping" not in names:
        count = names.index("min_8bit_size")
        yield Optimizer2State, "__init__", lambda self, *args, **more: init(self, *args[:count], **more)


HELD_OUT = 16  # passages for validation


def _passages(job: Run, *_: Any, split: str = "train", **__: Any) -> Any:
    """Passages of a local text as C4 has its documents; the last ones are for validation."""
    import datasets

    passages = json.loads((job.corpus / "passages.json").read_text())
    held_out = passages[-HELD_OUT:] if split == "validation" else passages[:-HELD_OUT]
    return datasets.Dataset.from_dict(
        {"text": held_out, "timestamp": [""] * len(held_out), "url": [""] * len(held_out)}
    ).to_iterable_dataset()


def _tokenizer(job: Run, name: str, **keywords: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(job.corpus / "tokenizer", **keywords)


def _built(source: Path, corpus: Path) -> types.ModuleType:
    """SLTrain's own extension, from the checkout."""
    from torch.utils import cpp_extension

    (corpus / "build").mkdir(exist_ok=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # of an environment's ninja
    with patch.dict(os.environ, {"PATH": path}):
        return cpp_extension.load("sltrain_linear", [str(source)], build_directory=str(corpus / "build"))


# ---- loggers --------------------------------------------------------------------------------------------------------


def _module(name: str, **names: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(names)
    return module


def _wandb() -> types.ModuleType:
    run = types.SimpleNamespace(dir=".", id="run", name="run")
    config = types.SimpleNamespace(update=_nothing)
    return _module(
        "wandb", run=run, config=config, **dict.fromkeys(("init", "log", "save", "watch", "finish"), _nothing)
    )


def _loguru() -> types.ModuleType:
    logger = types.SimpleNamespace(**dict.fromkeys(("info", "warning", "error", "remove"), _nothing))
    return _module("loguru", logger=logger)


# ---- what is written down -------------------------------------------------------------------------------------------


def _written_down(job: Run) -> Replaced:
    yield torch.autograd, "backward", _recorded(job.losses)
    for kind in _classes():
        yield kind, "__init__", _noting_keywords(kind.__init__, job.keywords)


def _recorded(losses: list[float]) -> Callable[..., None]:
    """``torch.autograd.backward`` that keeps the numbers it starts from."""
    plain = torch.autograd.backward

    def backward(tensors: Tensor | Sequence[Tensor], *args: Any, **kwargs: Any) -> None:
        losses.extend(float(t.detach()) for t in ([tensors] if isinstance(tensors, Tensor) else tensors))
        plain(tensors, *args, **kwargs)

    return backward


def _classes() -> list[type[torch.optim.Optimizer]]:
    from gracile import optim

    kinds = (getattr(optim, name) for name in optim.__all__)
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)]


def _noting_keywords(init: Callable[..., None], seen: set[str]) -> Callable[..., None]:
    @functools.wraps(init)
    def noting(self: Any, params: Any, *args: Any, **keywords: Any) -> None:
        given = list(params)
        groups = [group for group in given if isinstance(group, dict)]
        init(self, given, *args, **keywords)
        seen.update(keywords, *(group.keys() - {"params"} for group in groups))

    return noting
