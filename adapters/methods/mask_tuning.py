"""Mask tuning: some weights of the model are switched off, none changes.  Zheng et al. 2023, arXiv:2307.15049.

    W m x n frozen;  p m x n scores, trained, at first 1e-2 everywhere
    b = 1[p > theta]                    theta 5e-3: at first all ones
    y = (b * W) x                       dp = G * W, G the gradient of b * W

Regularised mask tuning (R-MT), where ``gradient_dropout`` is above 0:

    a, b = dL/dp, dKL/dp                KL(p0 || p) of the tokens with labels, p0 of the model without the mask
    P = (1 + sign(a) (a + b) / (|a| + |b|)) / 2;   dp = ((1 - l) + l 1[P > u]) a,   u uniform, l gradient_dropout

of the whole gradients of a step, before the optimizer: a pass of the base, a second backward and b more. Scores cost
the memory of full fine-tuning. What is saved of a finished adapter is b, a bit a weight, with ``save_scores=False``;
training goes on exactly only from scores.

Departures: bits are packed by eights, where the authors write a decimal number and lose its leading zeros; and where
gradients are clipped, that is done to a.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from ...rng import generator_of
from ...validation import Check, flag, number
from ..config import AdapterConfig
from ..layer import AdapterLayer, Tensors
from ..names import AdapterType
from ..output_terms import rows_of, token_consistency
from ..registry import register
from ..straight_through import packed_bits, straight_through, unpacked_bits


@dataclass
class MaskTuningConfig(AdapterConfig):
    """Mask tuning (arXiv:2307.15049): m n trained scores a matrix, of which m n bits are the adapter.

    Attributes:
        score: what scores begin with; a weight is off where its score is at most ``threshold``.
        threshold: theta.
        save_scores: save scores (fp32); False saves the mask alone, a bit a weight.
        gradient_dropout: l, the share of a gradient that is dropped where it and that of the distance to the model
            without the mask disagree; 1 in most of the paper, 0.3 on its larger sets, 0 for plain mask tuning. Not
            under DeepSpeed or FSDP2.

    Example:
        >>> from gracile.adapters import MaskTuningConfig
        >>> MaskTuningConfig(target_modules=["q_proj"]).threshold
        0.005
    """

    checks: ClassVar[Mapping[str, Check]] = {
        "score": number("> 0"),
        "threshold": number("> 0"),
        "save_scores": flag(),
        "gradient_dropout": number("in [0, 1]"),
    }

    without_effect: ClassVar[tuple[str, ...]] = ("r", "alpha", "dropout")

    score: float = field(default=1e-2, metadata={"help": "What scores begin with."})
    threshold: float = field(default=5e-3, metadata={"help": "A weight is off where its score is at most this."})
    save_scores: bool = field(default=True, metadata={"help": "Save scores; False saves masks alone."})
    gradient_dropout: float = field(
        default=0.0, metadata={"help": "Share of a gradient that is dropped where the distance's disagrees (R-MT)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score <= self.threshold:
            raise ValueError(f"score must be above threshold={self.threshold}, got {self.score!r}")

    @property
    def reads_outputs(self) -> bool:
        return self.gradient_dropout > 0

    @property
    def reads_base(self) -> bool:
        return self.gradient_dropout > 0

    def distance_of_outputs(self, logits: Tensor, base: Tensor | None, labels: Tensor | None) -> Tensor | None:
        assert base is not None
        return token_consistency(rows_of(logits, labels), rows_of(base, labels))


@register(AdapterType.MASKTUNING, MaskTuningConfig)
class MaskTuningLayer(AdapterLayer):
    """A linear layer with a trained mask over it."""

    prefix, trained = "masktuning_", ("p",)

    def __init__(self, *args: Any, **keywords: Any) -> None:
        self._distances: dict[str, tuple[Tensor, Tensor]] = {}  # of the passes so far: gradients, and their shares
        super().__init__(*args, **keywords)
        self.register_state_dict_post_hook(_pack)
        self.register_load_state_dict_pre_hook(_unpack)

    def check_rank(self, r: int) -> None:
        """There is none."""

    def start(self, weight: Tensor, config: Any, r: int) -> Tensors:
        return {"p": torch.full(weight.shape, config.score)}

    def shapes(self, config: Any, r: int) -> dict[str, tuple[int, ...]]:
        return {"p": (self.out_features, self.in_features)}

    def delta(self, weight: Tensor, config: Any, **tensors: Tensor) -> Tensor:
        p = tensors["p"]
        return (straight_through(p, p > config.threshold) - 1) * weight

    def take_distance(self, adapter: str, gradients: Tensors, share: Tensor | float) -> None:
        p = self.tensors(adapter)["p"]
        gradient, part = gradients["p"] * share, torch.as_tensor(share, device=p.device, dtype=torch.float32)
        held = self._distances.get(adapter)
        self._distances[adapter] = (gradient, part) if held is None else (held[0] + gradient, held[1] + part)

    @torch.no_grad()
    def before_step(self, step: int, adapter: str) -> None:
        config: Any = self.settings[adapter]
        p = self.tensors(adapter)["p"]
        if not config.gradient_dropout or p.grad is None:
            return
        if adapter not in self._distances:
            raise ValueError(
                "gradient_dropout needs the outputs of the passes of a step, and the model returned no loss; give it "
                "labels, or call gracile.adapters.with_penalty"
            )
        gradient, share = self._distances.pop(adapter)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(gradient)
            dist.all_reduce(share)
        seed = generator_of("gradient_dropout", config.seed, self.name, step).initial_seed()
        generator = torch.Generator(p.device).manual_seed(seed)
        p.grad.copy_(_gated(p.grad, gradient / share, config.gradient_dropout, generator))


def _pack(layer: MaskTuningLayer, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    for adapter, config in layer.settings.items():
        key = f"{prefix}{layer.prefix}p.{adapter}"
        if key in state and not config.save_scores:
            state[key] = packed_bits(state[key] > config.threshold)


def _unpack(layer: MaskTuningLayer, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for adapter, config in layer.settings.items():
        key = f"{prefix}{layer.prefix}p.{adapter}"
        if key in state and state[key].dtype == torch.uint8:
            mask = unpacked_bits(state[key], (layer.out_features, layer.in_features))
            state[key] = torch.where(mask, config.score, 0.0)


def gradient_dropout(
    loss: Tensor, distance: Tensor, parameters: Iterable[Tensor], level: float = 1.0, generator: Any = None
) -> None:
    """Give scores the gradient of ``loss``, where it agrees with that of ``distance`` (R-MT).

        P = (1 + sign(g_a) (g_a + g_b) / (|g_a| + |g_b|)) / 2;   g = ((1 - level) + level 1[P > U]) g_a,  U uniform

    Args:
        loss: the task's.
        distance: of the model's outputs to those without the mask, such as a KL divergence.
        parameters: the scores; what is found is added to their ``grad``.
        level: how much of a gradient is dropped: 1 in most of the paper, 0.3 on its larger sets.
    """
    held = list(parameters)
    of_task = torch.autograd.grad(loss, held, retain_graph=True)
    of_distance = torch.autograd.grad(distance, held)
    for p, a, b in zip(held, of_task, of_distance, strict=True):
        gradient = _gated(a, b, level, generator)
        p.grad = gradient if p.grad is None else p.grad + gradient


def _gated(a: Tensor, b: Tensor, level: float, generator: Any) -> Tensor:
    agreement = (1 + a.sign() * (a + b) / (a.abs() + b.abs() + 1e-8)) / 2
    kept = agreement > torch.rand(a.shape, generator=generator, device=a.device)
    return ((1 - level) + level * kept) * a
