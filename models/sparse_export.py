"""A trained sparse model with each layer in the form that is fastest here; saved, and loaded again.

    for every nn.Linear that is at least half zeros
        candidates: dense, condensed, CSR, blocks, 2:4            those that can hold it, on this device
    measured at the given number of tokens                        all layers in one form, then all in the next, in turns
    the fastest form takes the layer's place                      by medians

Measuring goes through all layers in turn, as a token does, so that weights are in a cache only if they would be in use.

A folder holds ``config.json`` (transformers), ``sparse.json`` (which layer has which form) and ``sparse.safetensors``:
values in the model's dtype, places in the smallest whole numbers that hold them.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..target_modules import experts_of
from ..validation import is_whole, nearest, require
from .layers import BlockSparseLinear, CondensedLinear, CSRLinear, InferenceLinear, SemiStructuredLinear

DENSE, AUTO = "dense", "auto"
FORMS: dict[str, type[InferenceLinear]] = {
    cls.form: cls for cls in (CondensedLinear, CSRLinear, BlockSparseLinear, SemiStructuredLinear)
}
CHOICES = (AUTO, DENSE, *FORMS)
LEAST = 0.5  # zeros: below, 16-bit values with 16-bit places are no smaller than W
BLOCKS = (128, 64, 32, 16)
WASTE = 1.05  # larger blocks are preferred until they store this many times what the smallest would
TURNS, SECONDS = 15, 10  # a measurement ends after so many turns, or after at least 3 and so long
LAYOUT, WEIGHTS, VERSION = "sparse.json", "sparse.safetensors", 1
WHOLE = (torch.uint8, torch.uint16, torch.int32, torch.int64)


class Exported(NamedTuple):
    """What became of a layer: one of the values that ``sparsify`` returns.

    Args:
        form: one of ``CHOICES`` without ``auto``: how the layer is stored now.
        zeros: the share of its weight that is zero.
        shape: of its weight, (out, in).
        ms: its milliseconds in each form that can hold it, by number of tokens.

    Example:
        >>> from torch import nn
        >>> from gracile.models.sparse_export import sparsify
        >>> model = nn.Sequential(nn.Linear(64, 32))
        >>> _ = model[0].weight.data[:, 16:].zero_()
        >>> exported = sparsify(model, form="csr", tokens=[4])["0"]
        >>> exported.form, exported.zeros, exported.shape, {"dense", "condensed", "csr"} <= exported.ms[4].keys()
        ('csr', 0.75, (32, 64), True)
    """

    form: str
    zeros: float
    shape: tuple[int, int]
    ms: dict[int, dict[str, float]]


def sparsify(model: nn.Module, form: str = AUTO, tokens: Sequence[int] = (1,)) -> dict[str, Exported]:
    """``model`` itself, its sparse linear layers in ``form``, for inference.

    Args:
        model: any module. Layers whose weight is also another module's (tied embeddings) stay as they are, and so do
            those that ``form`` cannot hold.
        form: one of ``CHOICES``; ``auto`` takes the fastest at the first number of ``tokens``.
        tokens: numbers of tokens to measure every form at.

    Returns:
        For each layer, by its name, what became of it: ``Exported``.

    Raises:
        ValueError: for an unknown form, one that can hold no layer here, a number of tokens below 1, or a model
            without sparse layers.

    Example:
        >>> from torch import nn
        >>> from gracile.models.sparse_export import sparsify
        >>> from gracile.optim import SRigLAdamW, param_groups
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
        >>> groups = param_groups(model, sparsity=0.75, target_modules="all-linear")
        >>> optimizer = SRigLAdamW(groups, distribution="uniform", t_end=750)  # masks the weights; then train
        >>> exported = sparsify(model, form="condensed")
        >>> model[0], exported["0"].zeros
        (CondensedLinear(in_features=64, out_features=32, bias=True, stored=512), 0.75)
    """
    require(form in CHOICES, f"form must be one of {', '.join(CHOICES)}; {nearest(form, CHOICES)}", form)
    for number in tokens:
        require(is_whole(number) and number >= 1, "tokens must be whole numbers >= 1", number)
    require(len(tokens) >= 1, "tokens must name a number to measure at", tuple(tokens))
    found = sparse_linears(model)
    if not found:
        experts = any(True for name, module in model.named_modules() for _ in experts_of(name, module))
        dense = " (experts in one tensor stay dense)" if experts else ""
        raise ValueError(f"no linear layer is at least {LEAST:.0%} zeros: there is nothing to leave out{dense}")
    layers = {name: candidates(linear) for name, linear in found.items()}
    if form != AUTO and not any(form in forms for forms in layers.values()):
        where = next(iter(found.values())).weight
        raise ValueError(
            f"no layer can be held in the form {form!r} in {where.dtype} on {where.device}; auto finds one"
        )
    ms = {number: medians(layers, number) for number in tokens}
    exported, chosen = {}, {}
    for name, linear in found.items():
        of_layer = {number: ms[number][name] for number in tokens}
        fastest = min(of_layer[tokens[0]], key=of_layer[tokens[0]].__getitem__)
        own = fastest if form == AUTO else form if form in layers[name] else DENSE
        exported[name] = Exported(own, zeros(linear.weight), (linear.out_features, linear.in_features), of_layer)
        chosen[name] = layers[name][own]
    put(model, chosen)
    return exported


def put(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put ``layers`` in the places that their names say."""
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)


def sparse_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers that have a weight of their own, at least half zeros."""
    holders = [(p.data_ptr(), name) for name, p in model.named_parameters(remove_duplicate=False)]
    shared = {pointer for pointer, _ in holders if sum(p == pointer for p, _ in holders) > 1}
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    return {
        name: linear
        for name, linear in linears.items()
        if linear.weight.data_ptr() not in shared and zeros(linear.weight) >= LEAST
    }


def zeros(weight: Tensor) -> float:
    """The share of ``weight`` that is zero."""
    return 1 - int(weight.count_nonzero()) / max(1, weight.numel())


def candidates(linear: nn.Linear) -> dict[str, nn.Module]:
    """``linear`` in every form that can hold it and compute with it on its device."""
    weight = linear.weight
    found: dict[str, nn.Module] = {DENSE: linear}
    for form, cls in FORMS.items():
        if cls is SemiStructuredLinear and not SemiStructuredLinear.usable(weight.device, weight.dtype):
            continue
        options: dict[str, Any] = {}
        if cls is BlockSparseLinear:
            options["block"] = block_of(weight)
            if options["block"] is None:
                continue
        try:
            found[form] = cls.from_linear(linear, **options)
        except ValueError:
            continue  # what it cannot hold, as rows of uneven length in condensed form
    return found


def block_of(weight: Tensor) -> int | None:
    """The largest block that stores hardly more than the smallest would; None where none divides W, or all would store
    more than half of it."""
    m, n = weight.shape
    stored = {}
    for b in BLOCKS:
        if m % b == 0 and n % b == 0:
            kept = (weight != 0).reshape(m // b, b, n // b, b).any(3).any(1)
            stored[b] = int(kept.sum()) * b * b
    least = min(stored.values(), default=0)
    if least > LEAST * m * n:
        return None
    return next((b for b, count in stored.items() if count <= WASTE * least), None)


@torch.inference_mode()
def medians(layers: Mapping[str, Mapping[str, nn.Module]], tokens: int) -> dict[str, dict[str, float]]:
    """Milliseconds on ``tokens`` tokens of each layer in each of its forms."""
    inputs: dict[int, Tensor] = {}
    for forms in layers.values():
        dense: Any = forms[DENSE]
        like = dense.weight
        drawn = torch.randn(tokens, dense.in_features, device=like.device, dtype=like.dtype)
        inputs.setdefault(dense.in_features, drawn)
    times: dict[str, dict[str, list[float]]] = {name: {form: [] for form in forms} for name, forms in layers.items()}
    began = time.perf_counter()
    for turn in range(TURNS + 1):
        for form in (DENSE, *FORMS):
            for name, forms in layers.items():
                layer: Any = forms.get(form)
                if layer is None:
                    continue
                took = _seconds(layer, inputs[layer.in_features])
                if turn:  # the first turn warms up
                    times[name][form].append(1e3 * took)
        if turn >= 3 and time.perf_counter() - began > SECONDS:
            break
    return {name: {form: statistics.median(of) for form, of in forms.items()} for name, forms in times.items()}


def _seconds(layer: nn.Module, x: Tensor) -> float:
    wait_for(x.device)
    start = time.perf_counter()
    layer(x)
    wait_for(x.device)
    return time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- files ----------------------------------------------------------------------------------------------------------


def save(model: PreTrainedModel, folder: str | Path) -> int:
    """Write ``model`` into ``folder``, which is made; returns the bytes of its weights' file.

    Args:
        model: of transformers, its sparse layers as ``sparsify`` has made them.
        folder: for ``config.json``, ``sparse.json`` and ``sparse.safetensors``.

    Example:
        >>> from gracile.models import build_llama
        >>> from gracile.models.sparse_export import save, sparsify
        >>> from gracile.optim import RigLAdamW, param_groups
        >>> small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        >>> model = build_llama("2m", vocab_size=64, **small)
        >>> optimizer = RigLAdamW(param_groups(model, sparsity=0.9), t_end=750)  # masks the weights; then train
        >>> dense = sum(p.numel() * p.element_size() for p in model.parameters())
        >>> exported = sparsify(model, form="csr")
        >>> save(model, "sparse") < dense
        True
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layers = {
        name: {"form": module.form, "in_features": module.in_features, "out_features": module.out_features}
        for name, module in model.named_modules()
        if isinstance(module, InferenceLinear)
    }
    packed = {f"{name}.{own}" for name in layers for own in FORMS[str(layers[name]["form"])].places}
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in model.state_dict().items():
        if (key := (tensor.data_ptr(), tensor.shape)) in seen and tensor.numel():
            continue  # tied: once is enough
        seen.add(key)
        tensors[name] = (narrowed(tensor) if name in packed else tensor).contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    text = json.dumps({"version": VERSION, "layers": layers}, indent=1)
    (folder / LAYOUT).write_text(text + "\n", encoding="utf-8")
    return (folder / WEIGHTS).stat().st_size


def narrowed(places: Tensor) -> Tensor:
    """The same whole numbers, none negative, in the smallest dtype that holds them."""
    largest = int(places.max()) if places.numel() else 0
    return places.to(next(dtype for dtype in WHOLE if largest <= torch.iinfo(dtype).max))


def _empty(folder: Path) -> PreTrainedModel:
    """The model of a folder's config.json, built from transformers' own classes: no code of the folder's is run."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model


def load(folder: str | Path, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The model that ``save`` wrote, in evaluation mode.

    Args:
        folder: that ``save`` wrote.
        device: where to put the model.

    Raises:
        ValueError: for a folder that ``save`` did not write, or one that a later version wrote.

    Example:
        >>> from gracile.models import build_llama
        >>> from gracile.models.sparse_export import load, save, sparsify
        >>> from gracile.optim import RigLAdamW, param_groups
        >>> small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
        >>> model = build_llama("2m", vocab_size=64, **small)
        >>> optimizer = RigLAdamW(param_groups(model, sparsity=0.9), t_end=750)  # masks the weights; then train
        >>> exported, tokens = sparsify(model, form="csr"), torch.tensor([[1, 2, 3]])
        >>> size = save(model, "sparse")
        >>> torch.allclose(load("sparse")(tokens).logits, model(tokens).logits, atol=1e-5)
        True
    """
    folder = Path(folder)
    if not (folder / LAYOUT).is_file() or not (folder / WEIGHTS).is_file():
        raise ValueError(f"{str(folder)!r} is no exported model: it must hold {LAYOUT} and {WEIGHTS}")
    layout = json.loads((folder / LAYOUT).read_text(encoding="utf-8"))
    require(layout.get("version") == VERSION, f"{LAYOUT}: version must be {VERSION}", layout.get("version"))
    tensors = load_file(folder / WEIGHTS, device=str(device))
    with no_init_weights(), torch.device(device):  # memory that is not written to takes none
        model = _empty(folder)
    for name, layer in layout["layers"].items():
        own = {key.removeprefix(f"{name}."): tensors.pop(key) for key in list(tensors) if key.startswith(f"{name}.")}
        made = FORMS[layer["form"]].from_tensors(layer["in_features"], layer["out_features"], own)
        put(model, {name: made})
        tensors |= {f"{name}.{key}": tensor for key, tensor in made.state_dict().items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    strange = [*unexpected, *(name for name in missing if name not in tied)]
    if strange:
        raise ValueError(f"{str(folder)!r} does not fit its config.json: {strange[0]} is on one side only")
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval()
