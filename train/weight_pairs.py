"""Pairs of matrices before and after a fine-tuning, from saved folders: a pair at a time, and no model is built."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..spectra import LowRankUpdate
from ..validation import nearest
from .errors import BadInput

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DTYPES = ("F64", "F32", "F16", "BF16")
# Matrices that are held inputs x outputs, by a model's type: transformers' Conv1D, and experts in one tensor.
CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")
INPUTS_FIRST = {
    **dict.fromkeys(("gpt2", "openai-gpt", "imagegpt", "decision_transformer"), CONV1D),
    **dict.fromkeys(("gpt_oss", "llama4", "llama4_text"), ("gate_up_proj", "down_proj")),
}
# What has two dimensions in a layer and is no map from inputs to outputs.
NO_MATRICES = re.compile(r"norm|embed|relative_attention_bias|(^|\.)ln_|bias$")
# What leaves W0 + s B A as it is; other ways to begin change the base's weights.
PLAIN_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")
# Fields of a LoRA's configuration with which its change is another than s B A of a matrix.
OTHER_LORA = (
    "use_dora", "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "layer_replication",
    "target_parameters", "trainable_token_indices",
)  # fmt: skip


class Place(NamedTuple):
    """Where in a model a matrix is.

    layer: such as ``3``, or ``encoder.block 3`` in a model of several stacks; empty outside of layers.
    kind: such as ``self_attn.q_proj``, the same for the experts of a layer.
    """

    name: str
    layer: str
    kind: str


class Pair(NamedTuple):
    """A matrix (outputs x inputs) before, and after or how it changed."""

    place: Place
    before: Tensor
    after: Tensor | LowRankUpdate


def place_of(name: str) -> Place:
    """By the name of a tensor, its first number that of the layer, a further one that of an expert."""
    plain = name.removesuffix(".weight")
    found = re.match(r"(?:(?P<stack>.*?)\.)?(?P<layer>\d+)\.(?P<kind>.+)", plain)
    if found is None:
        return Place(name, "", plain)
    kind = re.sub(r"\.\d+(?=\.|$)", "", found["kind"]) if "expert" in plain else found["kind"]
    return Place(name, f"{found['stack'] or ''} {found['layer']}".strip(), kind)


class Weights:
    """The tensors of a folder of safetensors, by name, read when they are asked for.

    Raises:
        BadInput: for a folder that holds none, or whose files are not whole.
    """

    def __init__(self, key: str, folder: Path, file: str = WEIGHTS) -> None:
        self.key, self.folder = key, folder
        self.files = self._by_index() if file == WEIGHTS and not (folder / file).is_file() else self._of_one(file)
        self._open: dict[str, Any] = {}

    def _of_one(self, file: str) -> dict[str, str]:
        return dict.fromkeys(self._handle(file).keys(), file)

    def _by_index(self) -> dict[str, str]:
        path = self.folder / INDEX
        if not path.is_file():
            others = [
                name for name in ("pytorch_model.bin", "pytorch_model.bin.index.json") if (self.folder / name).exists()
            ]
            way = f"only {others[0]}; save it again with save_pretrained, which writes safetensors" if others else ""
            raise BadInput(
                f"{self.key} {str(self.folder)!r} holds "
                + (way or f"neither {WEIGHTS} nor {ADAPTER}: give the folder of a saved model or of a LoRA adapter")
            )
        files = read_json(path).get("weight_map")
        names = isinstance(files, dict) and all(isinstance(f, str) and Path(f).name == f for f in files.values())
        if not names:
            raise BadInput(f"{path} has no weight_map from tensors to files beside it; save the model again")
        assert isinstance(files, dict)
        return files

    def _handle(self, file: str) -> Any:
        try:
            return safe_open(self.folder / file, framework="pt")
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise BadInput(f"{self.key} file {str(self.folder / file)!r} cannot be read: {reason}") from None

    def slice_of(self, name: str) -> Any:
        """A tensor whose shape is known and whose parts are read when they are asked for."""
        file = self.files[name]
        if file not in self._open:
            self._open[file] = self._handle(file)
        try:
            return self._open[file].get_slice(name)
        except SafetensorError:
            raise BadInput(f"{self.key} file {str(self.folder / file)!r} lacks {name}, which {INDEX} says") from None

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.slice_of(name).get_shape())

    def tensor(self, name: str) -> Tensor:
        whole: Tensor = self.slice_of(name)[:]
        return whole


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path} must hold a mapping, got a {type(value).__name__}")
    return value


def read_pairs(base: Path, tuned: Path, modules: list[str], embeddings: bool) -> tuple[list[str], Iterator[Pair]]:
    """The names of the matrices to compare, and their pairs as they are read.

    Args:
        modules: patterns, each a part of a name or a regular expression for all of it; none for the matrices of layers.
        embeddings: whether the matrices outside of layers count too.

    Raises:
        BadInput: where the folders cannot be read or do not fit each other.
    """
    for key, folder in (("BASE", base), ("TUNED", tuned)):
        if not folder.is_dir():
            raise BadInput(f"{key} {str(folder)!r} is no folder; give that of a saved model")
    if (base / ADAPTER_CONFIG).is_file() and not (base / WEIGHTS).is_file() and not (base / INDEX).is_file():
        raise BadInput(f"BASE {str(base)!r} is an adapter; give the folder of the model that it was trained on")
    before = Weights("BASE", base)
    names = _chosen(before, modules, embeddings)
    transposed = _inputs_first(base)
    is_adapter = (tuned / ADAPTER_CONFIG).is_file()
    after: Tuned = Adapter(tuned, before) if is_adapter else Whole(tuned, before, names)
    names = [name for name in names if after.has(name)]
    for name in names:
        _check_dtype(before, name)
    if not names:
        raise BadInput(
            f"TUNED {str(tuned)!r} changes none of the matrices that were chosen; choose others with --modules"
        )
    return names, _pairs(before, after, names, transposed)


def _pairs(before: Weights, after: Tuned, names: list[str], transposed: tuple[str, ...]) -> Iterator[Pair]:
    for name in names:
        place = place_of(name)
        turned = place.kind.rpartition(".")[2] in transposed
        if len(before.shape(name)) == 2:
            W0, W1 = before.tensor(name), after.change(name, None)
            yield Pair(place, W0.mT, W1.mT) if turned else Pair(place, W0, W1)
            continue
        for expert in range(before.shape(name)[0]):
            W0, W1 = before.slice_of(name)[expert], after.change(name, expert)
            one = Place(f"{name}[{expert}]", place.layer, place.kind)
            yield Pair(one, W0.mT, W1.mT) if turned else Pair(one, W0, W1)


def _inputs_first(base: Path) -> tuple[str, ...]:
    path = base / "config.json"
    return INPUTS_FIRST.get(str(read_json(path).get("model_type")), ()) if path.is_file() else ()


def _chosen(weights: Weights, modules: list[str], embeddings: bool) -> list[str]:
    """The matrices among the tensors, in the order of their layers."""
    matrices = [name for name in weights.files if _is_matrix(name, weights.shape(name), embeddings)]
    matrices.sort(key=lambda name: [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")])
    if not modules:
        if not matrices:
            raise BadInput(
                f"BASE {str(weights.folder)!r} holds no matrix of a numbered layer; --embeddings takes others"
            )
        return matrices
    chosen: set[str] = set()
    for pattern in modules:
        try:
            found = {name for name in matrices if pattern in name or re.fullmatch(pattern, name)}
        except re.error as error:
            raise BadInput(f"modules: {pattern!r} is no regular expression: {error}") from None
        if not found:
            raise BadInput(f"modules: {pattern!r} matches no matrix; {nearest(pattern, _parts(matrices))}")
        chosen |= found
    return [name for name in matrices if name in chosen]


def _parts(names: list[str]) -> set[str]:
    """What modules are called, in full and by the last part."""
    kinds = {place_of(name).kind for name in names}
    return kinds | {kind.rpartition(".")[2] for kind in kinds}


def _is_matrix(name: str, shape: tuple[int, ...], embeddings: bool) -> bool:
    """Vectors have no spectrum; convolutions are no matrices."""
    if min(shape, default=0) < 2 or not (len(shape) == 2 or (len(shape) == 3 and "expert" in name)):
        return False
    return embeddings or bool(place_of(name).layer and not NO_MATRICES.search(name))


class Tuned:
    """What became of the matrices."""

    def has(self, name: str) -> bool:
        raise NotImplementedError

    def change(self, name: str, expert: int | None) -> Tensor | LowRankUpdate:
        raise NotImplementedError


class Whole(Tuned):
    """A folder with all of a model's weights."""

    def __init__(self, folder: Path, before: Weights, names: list[str]) -> None:
        self.weights = Weights("TUNED", folder)
        for name in names:
            if name not in self.weights.files:
                way = nearest(name, self.weights.files)
                raise BadInput(
                    f"TUNED {str(folder)!r} lacks {name}, which BASE has: are they of one model? ({way[:200]})"
                )
            _check_dtype(self.weights, name)
            _check_shape(name, before.shape(name), self.weights.shape(name))

    def has(self, name: str) -> bool:
        return True

    def change(self, name: str, expert: int | None) -> Tensor:
        tensor: Tensor = self.weights.slice_of(name)[:] if expert is None else self.weights.slice_of(name)[expert]
        return tensor


class Adapter(Tuned):
    """A folder of a LoRA adapter that peft saved: factors, and whole tensors of what was trained beside them."""

    def __init__(self, folder: Path, before: Weights) -> None:
        self.config = read_json(folder / ADAPTER_CONFIG)
        self._check_config(folder)
        if not (folder / ADAPTER).is_file():
            raise BadInput(f"TUNED {str(folder)!r} holds {ADAPTER_CONFIG} and no {ADAPTER}; save the adapter again")
        self.weights = Weights("TUNED", folder, ADAPTER)
        self.factors: dict[str, dict[str, str]] = {}
        self.whole: dict[str, str] = {}
        for stored in self.weights.files:
            self._place(stored, before)
        for name, parts in self.factors.items():
            self._check_factors(name, parts, before)

    def _check_config(self, folder: Path) -> None:
        kind = self.config.get("peft_type")
        merge = "merge it into its model first (merge_and_unload, save_pretrained), and give that folder"
        if kind != "LORA":
            raise BadInput(f"TUNED {str(folder)!r} is a peft adapter of type {kind}, and LORA alone is read; {merge}")
        for field in OTHER_LORA:
            if self.config.get(field):
                raise BadInput(f"TUNED {str(folder)!r} is a LoRA with {field}, which is not read; {merge}")
        beginning = self.config.get("init_lora_weights", True)
        if beginning not in PLAIN_BEGINNINGS:
            raise BadInput(
                f"TUNED {str(folder)!r} began with init_lora_weights {beginning!r}, which changes the base; {merge}"
            )

    def _place(self, stored: str, before: Weights) -> None:
        """Find the tensor of the base that a stored one is for."""
        plain = stored.removeprefix("base_model.model.")
        found = re.fullmatch(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?", plain)
        if found and f"{found[1]}.weight" in before.files:
            self.factors.setdefault(f"{found[1]}.weight", {})[found[2]] = stored
        elif plain in before.files:
            self.whole[plain] = stored
        elif not plain.endswith(".bias") and plain != "lm_head.weight":  # tied to embeddings, where BASE has none
            way = "is it BASE's adapter? A change that is no plain LoRA must be merged first"
            raise BadInput(f"TUNED holds {stored}, for which BASE has no matrix; {way}")

    def _check_factors(self, name: str, parts: Mapping[str, str], before: Weights) -> None:
        if parts.keys() != {"A", "B"}:
            raise BadInput(
                f"TUNED has one factor for {name}, lora_{''.join(parts)}, and lacks the other; save it again"
            )
        B, A = self.weights.shape(parts["B"]), self.weights.shape(parts["A"])
        if B[1:] != A[:1]:
            raise BadInput(f"TUNED has factors for {name} of shapes {B} and {A}, which do not fit; save it again")
        shape = (B[0], A[1])
        _check_shape(name, before.shape(name), shape[::-1] if self._is_turned(name) else shape)

    def _is_turned(self, name: str) -> bool:
        """Whether the base holds what B A changes inputs x outputs, or as an embedding."""
        return bool(self.config.get("fan_in_fan_out")) or "lora_embedding_A" in self.factors[name]["A"]

    def has(self, name: str) -> bool:
        return name in self.factors or name in self.whole

    def change(self, name: str, expert: int | None) -> Tensor | LowRankUpdate:
        if name in self.whole:
            whole: Tensor = self.weights.tensor(self.whole[name])
            return whole if expert is None else whole[expert]
        B, A = (self.weights.tensor(self.factors[name][part]).float() for part in "BA")
        update = LowRankUpdate(self._scale(name, len(A)) * B, A)
        return update.mT if self._is_turned(name) else update

    def _scale(self, name: str, rank: int) -> float:
        alpha = self.config.get("lora_alpha", 8)
        for pattern, own in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", name.removesuffix(".weight")):
                alpha = own
                break
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def _check_dtype(weights: Weights, name: str) -> None:
    held = weights.slice_of(name).get_dtype()
    if held not in DTYPES:
        raise BadInput(f"{weights.key} holds {name} in {held}, and weights that are quantized are not read")


def _check_shape(name: str, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    if before != after:
        shapes = " and ".join(" x ".join(map(str, shape)) for shape in (before, after))
        raise BadInput(f"{name} is {shapes} in BASE and TUNED; give two states of one model")
