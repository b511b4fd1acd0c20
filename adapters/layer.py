"""A linear layer with adapters beside a weight that is never rewritten, until they are merged.

    y = W x + s delta x          W out x in, frozen; delta what a method makes of its tensors and of W

A method is a subclass: ``start`` gives its tensors at the beginning, ``delta`` or, where the change is of low rank,
``factors`` what they stand for. Switching off, several adapters, merging, quantized bases, files and the export as a
LoRA follow from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..rng import generator_of
from .config import AdapterConfig
from .factors import marks
from .gathering import whole

Tensors = dict[str, Tensor]
MARKS = "marks"


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A linear layer of the base model with the adapters of one method.

    Attributes:
        prefix: the method's name in lower case with "_" behind it, which peft and transformers look for.
        trained, frozen: short names of a method's tensors; the attributes, prefix + name, are dictionaries over
            adapters.
        kept: likewise of tensors that training changes without gradients.
        shared: those of the trained that all layers have in common.
        dtypes: of tensors that are not fp32.
        needs_statistics: whether ``start`` reads what ``calibrate`` found.
        adapts_experts: whether the method takes experts in one tensor (E, m, n): its functions are then mapped over E.
        settings: the configuration of each adapter.
        name: of the layer in the model.
    """

    prefix: str = ""
    trained: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    dtypes: Mapping[str, torch.dtype] = MappingProxyType({})
    needs_statistics = False
    adapts_experts = False
    frozen_names: tuple[str, ...]
    merged_adapters: list[str]
    in_features: int
    out_features: int

    # ---- what a method says -----------------------------------------------------------------------------------------

    @property
    def most(self) -> int:
        """The highest rank that the layer can have."""
        return min(self.in_features, self.out_features)

    def rank(self, config: Any) -> int:
        """The rank of the layer; one that the weight tells is put into the configuration's ``rank_pattern``."""
        rank: int = config.rank_of(self.name)
        return rank

    def start(self, weight: Tensor, config: Any, r: int) -> Tensors:
        """All tensors of a new adapter, by short name, from the weight (m x n, fp32)."""
        raise NotImplementedError

    def shapes(self, config: Any, r: int) -> dict[str, tuple[int, ...]]:
        """The same as shapes: where tensors come from a file, nothing is decomposed."""
        raise NotImplementedError

    def delta(self, weight: Tensor, config: Any, **tensors: Tensor) -> Tensor:
        """The change of the weight (m x n), without the scale. ``weight`` is in fp32, whatever the base has."""
        raise NotImplementedError

    def changed(self, x: Tensor, adapter: str) -> Tensor:
        """What the change makes of the layer's input, without the scale."""
        return F.linear(x, self.delta(self.wide_weight(), self.settings[adapter], **self.tensors(adapter)))

    def penalty(self, config: Any, **tensors: Tensor) -> Tensor | None:
        """A term of the loss, already weighted; or None."""
        return None

    def take_distance(self, adapter: str, gradients: Tensors, share: Tensor | float) -> None:
        """Given the gradients of ``distance_of_outputs`` of the configuration, by short name, once a pass, which is
        ``share`` of a step."""

    def before_step(self, step: int, adapter: str) -> None:
        """Called before each step of an optimizer that holds these parameters, with its number from 1."""

    def on_step(self, step: int, adapter: str) -> None:
        """Called after it."""

    # ---- adapters ---------------------------------------------------------------------------------------------------

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        cls.adapter_layer_names = tuple(cls.prefix + name for name in cls.trained)
        cls.frozen_names = tuple(cls.prefix + name for name in (*cls.frozen, *cls.kept, MARKS))
        cls.other_param_names = (*cls.frozen_names, "settings", "dropouts")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter: str,
        config: AdapterConfig,
        name: str,
        shared_by_all: dict[tuple[str, str], nn.Parameter],
        **keywords: Any,
    ) -> None:
        super().__init__()
        self.base_layer, self.name = base_layer, name
        self._shared_by_all = shared_by_all  # what layers have in common, by adapter and short name
        self.merged_adapters = []
        self._unmerged: Tensor | None = None  # the base's weight, while adapters are merged into it
        self._awaited: set[str] = set()  # adapters whose tensors have to come from a file
        self._active_adapter = adapter
        self.settings: dict[str, Any] = {}  # an AdapterConfig each
        self.dropouts = nn.ModuleDict()
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **keywords)
        self.in_features, self.out_features = self.sides()
        for held in self.adapter_layer_names:
            setattr(self, held, nn.ParameterDict())
        for held in self.frozen_names:
            setattr(self, held, Buffers())
        self.register_load_state_dict_pre_hook(_refuse_another_base)
        self.update_layer(adapter, config)

    def sides(self) -> tuple[int, int]:
        """n and m."""
        sides: Any = _get_in_out_features(self.get_base_layer())
        n, m = sides
        return n, m

    def update_layer(self, adapter: str, config: AdapterConfig) -> None:
        """Add an adapter, which starts from the weight.

        Raises:
            ValueError: for a rank above the weight's short side, a layer that is merged, or no statistics.
        """
        if self.merged:
            raise ValueError(
                f"{self.name} is merged; unmerge it before adding an adapter, which starts from its weight"
            )
        r = self.rank(config)
        self.check_rank(r)
        # Under low_cpu_mem_usage peft makes parameters on meta: what they hold, and what is frozen if that was saved,
        # comes from a file
        if self.weightless or (nn.Parameter(torch.empty(0)).is_meta and config.save_projection):
            tensors = self._empty(config, r)
        elif self.needs_statistics and self.name not in config.statistics:
            tensors = self._to_be_loaded(adapter, config, r)
        else:
            with torch.no_grad():
                tensors = self.started(config, r)
        self._hold(adapter, config, tensors)

    @property
    def weightless(self) -> bool:
        """Whether the base has no memory, as in a plan: then there is nothing to start from but shapes."""
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        return bool(device.type == "meta")

    def _empty(self, config: AdapterConfig, r: int) -> Tensors:
        device = "meta" if self.weightless else None
        shapes = self.all_shapes(config, r)
        return {name: torch.empty(shapes[name], dtype=self.dtypes.get(name), device=device) for name in shapes}

    def started(self, config: AdapterConfig, r: int) -> Tensors:
        """``start``, of all matrices that the layer has."""
        return self.start(self.wide_weight(), config, r)

    def all_shapes(self, config: AdapterConfig, r: int) -> dict[str, tuple[int, ...]]:
        """``shapes``, likewise."""
        return self.shapes(config, r)

    def check_rank(self, r: int) -> None:
        if r > self.most:
            raise ValueError(
                f"r must be at most {self.most} for {self.name} ({self.out_features} x {self.in_features}), got {r}; "
                "rank_pattern gives single layers another rank"
            )

    def generator(self, config: AdapterConfig) -> torch.Generator:
        """What draws a layer's numbers: by the seed and the layer's name, so that no two layers have the same."""
        return generator_of("adapter", config.seed, self.name)

    def _to_be_loaded(self, adapter: str, config: AdapterConfig, r: int) -> Tensors:
        """Zeros, until a saved adapter is loaded into them; a configuration from a file says that there was one."""
        if not config.calibrated:
            raise ValueError(
                f"{type(config).__name__} starts from the gradients of some batches; call "
                "gracile.adapters.calibrate(model, config, batches) before get_peft_model"
            )
        self._awaited.add(adapter)
        return {name: torch.zeros(shape) for name, shape in self.all_shapes(config, r).items()}

    def _expect_loaded(self, adapter: str) -> None:
        if not all(tensor.any() for name, tensor in self.tensors(adapter).items() if name in self.frozen):
            raise ValueError(f"adapter {adapter!r} of {self.name} has nothing in it: its file was not loaded")
        self._awaited.discard(adapter)

    def _hold(self, adapter: str, config: AdapterConfig, tensors: Tensors) -> None:
        self.settings[adapter] = config
        self.dropouts[adapter] = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        for name in self.trained:
            own = nn.Parameter(tensors[name].clone())
            if name in self.shared:
                own = self._shared_by_all.setdefault((adapter, name), own)
            getattr(self, self.prefix + name)[adapter] = own
        for name in self.frozen:
            getattr(self, self.prefix + name).put(adapter, tensors[name], persistent=config.save_projection)
        for name in self.kept:
            getattr(self, self.prefix + name).put(adapter, tensors[name], persistent=True)
        if self.frozen and not config.save_projection:
            of_base = marks(*(tensors[name] for name in self.frozen[:2]))
            getattr(self, self.prefix + MARKS).put(adapter, of_base, persistent=True)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """To the device, and not to the dtype: factors rounded to bf16 would not be orthonormal any more."""
        device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        for name in (*self.adapter_layer_names, *self.frozen_names):
            held = getattr(self, name)
            if adapter_name in held and not held[adapter_name].is_meta:
                held[adapter_name] = held[adapter_name].to(device)

    def has(self, adapter: str) -> bool:
        return adapter in self.settings

    def tensors(self, adapter: str) -> Tensors:
        return {name: getattr(self, self.prefix + name)[adapter] for name in (*self.trained, *self.frozen, *self.kept)}

    def whole_tensors(self, adapter: str) -> Tensors:
        """The same where an engine has split them, to be read. Collective."""
        return {name: whole(tensor) for name, tensor in self.tensors(adapter).items()}

    def scale(self, adapter: str) -> float:
        return self.settings[adapter].scale_of(self.name)

    # ---- the weight -------------------------------------------------------------------------------------------------

    def wide_weight(self) -> Tensor:
        """The base's weight, out x in and dequantized, in fp32."""
        weight: Tensor = self._unmerged if self._unmerged is not None else self._base_weight()
        return (weight.mT if isinstance(self.get_base_layer(), Conv1D) else weight).detach().float()

    def _base_weight(self) -> Tensor:
        held: Any = self.get_base_layer().weight
        if hasattr(held, "ds_id") or hasattr(held, "full_tensor"):
            return whole(held).detach()
        weight: Tensor = self.get_base_weight()
        return weight

    def _write_base(self, weight: Tensor) -> None:
        self.set_base_weight(weight)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change of an adapter, as the base lays its weight out."""
        delta = self.delta(self.wide_weight(), self.settings[adapter], **self.tensors(adapter)) * self.scale(adapter)
        return delta.mT if isinstance(self.get_base_layer(), Conv1D) else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def forward(self, x: Tensor, *args: Any, **keywords: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **keywords)
        if self.disable_adapters or self.merged:
            return result
        for adapter in self.active_adapters:
            if self.has(adapter):
                if adapter in self._awaited:
                    self._expect_loaded(adapter)
                wide = self._cast_input_dtype(self.dropouts[adapter](x), self._dtype(adapter))
                change, scale = self.changed(wide, adapter), self.scale(adapter)
                result = result + (change if scale == 1 else change * scale).to(result.dtype)
        return result

    def _dtype(self, adapter: str) -> torch.dtype:
        first: Tensor = getattr(self, self.prefix + self.trained[0])[adapter]
        return first.dtype

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write W + s delta into the base. W itself is kept, so that ``unmerge`` gives it back to the bit."""
        for adapter in check_adapters_to_merge(self, adapter_names) or ():
            if not self.has(adapter):
                continue
            weight = self._base_weight()
            merged = (weight.float() + self.get_delta_weight(adapter).detach()).to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"adapter {adapter!r} makes weights of {self.name} that are not finite")
            if self._unmerged is None:
                self._unmerged = weight.detach().clone()
            self._write_base(merged)
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        if self._unmerged is not None:
            self._write_base(self._unmerged.to(self._base_weight().device))
            self._unmerged = None
        self.merged_adapters.clear()

    def __repr__(self) -> str:
        return "gracile." + super().__repr__()


class LowRankLayer(AdapterLayer):
    """An adapter whose change is a product of two thin factors, which is never formed in training."""

    def factors(self, config: Any, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        """left (m x k) and right (k x n), without the scale."""
        raise NotImplementedError

    def delta(self, weight: Tensor, config: Any, **tensors: Tensor) -> Tensor:
        left, right = self.factors(config, **tensors)
        return left @ right

    def changed(self, x: Tensor, adapter: str) -> Tensor:
        left, right = self.factors(self.settings[adapter], **self.tensors(adapter))
        return F.linear(F.linear(x, right), left)

    def get_delta_weight(self, adapter: str) -> Tensor:
        left, right = self.lora_factors(adapter)
        return (left @ right).mT if isinstance(self.get_base_layer(), Conv1D) else left @ right

    def lora_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """lora_B (m x k), which has the scale, and lora_A (k x n) of the same change, exactly."""
        left, right = self.factors(self.settings[adapter], **self.tensors(adapter))
        return left * self.scale(adapter), right


class Buffers(BufferDict):
    """A dictionary of buffers in which each keeps its own answer to whether it is saved."""

    def put(self, key: str, buffer: Tensor, persistent: bool) -> None:
        self.register_buffer(key, buffer, persistent=persistent)

    def __setitem__(self, key: str, buffer: Tensor) -> None:  # peft puts buffers again when it casts or moves them
        self.put(key, buffer, key not in self._non_persistent_buffers_set)


def _refuse_another_base(layer: AdapterLayer, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Frozen factors that were made anew must be those that the adapter was trained with."""
    own = getattr(layer, layer.prefix + MARKS)
    for adapter in own:
        theirs = state.get(f"{prefix}{layer.prefix}{MARKS}.{adapter}")
        if theirs is not None and adapter in layer._awaited:
            raise ValueError(
                f"adapter {adapter!r} of {layer.name} was saved without its factors, which come from gradients; give "
                "PeftModel.from_pretrained a config that gracile.adapters.calibrate has run with on the same batches"
            )
        if theirs is not None and not torch.allclose(theirs.cpu(), own[adapter].cpu(), rtol=1e-2, atol=1e-3):
            raise ValueError(
                f"adapter {adapter!r} of {layer.name} was trained beside another base weight (another checkpoint, or a "
                "quantized one), and its frozen factors were not saved; load it with the base that it was trained on"
            )
