"""Loading that gives back what was saved: every tensor in its own dtype, nothing shared, nothing that does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

# Keys of a group that stay what they are when another is loaded.
OWN_KEYS = ("group_number", "capturable")


class FaithfulLoading(torch.optim.Optimizer):
    """An optimizer whose ``load_state_dict`` keeps dtypes, copies, and checks before it changes anything.

    Attributes:
        later_keys: keys of groups that came when there were checkpoints already, with the values that they had before.
            At these groups do not hold them (``ParamGroup``), and where they are missing they are these.
    """

    later_keys: ClassVar[Mapping[str, Any]] = {}

    def check_keys(self, group: dict[str, Any]) -> None:
        """Refuse keys of a group that would be ignored."""
        raise NotImplementedError

    def check_values(self, group: dict[str, Any]) -> None:
        """Refuse bad values of a group."""
        raise NotImplementedError

    def with_own_names(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group whose keys are called as here."""
        raise NotImplementedError

    def own_form(self, parameter: Tensor, group: dict[str, Any], saved: Mapping[str, Any]) -> dict[str, Any] | None:
        """Saved state under the keys that it has here, where another optimizer saved it; None where that had none yet.

        Raises:
            ValueError: where this optimizer would not go on as that one.
        """
        return tensors_of(saved)

    def expected_state(
        self, parameter: Tensor, group: dict[str, Any], saved: Mapping[str, Any]
    ) -> Mapping[str, tuple[int, ...]] | None:
        """The shapes that would fit in the place of ``saved``; None where it cannot be said."""
        raise NotImplementedError

    def loaded_state(
        self, parameter: Tensor, group: dict[str, Any], saved: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """The part of ``saved`` that this process holds."""
        return saved

    def saved_state(self, parameter: Tensor, group: dict[str, Any], held: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``held`` as ``state_dict`` saves it."""
        return held

    def forget(self) -> None:
        """States are others now: what is known of those before is not true of them."""

    def host_keys(self, parameter: Tensor, group: dict[str, Any]) -> set[str]:
        """The keys of a parameter's state that are kept on the CPU."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.Optimizer.state_dict``; where FSDP2 splits a parameter, what is split of its state is a
        DTensor, which torch.distributed.checkpoint can load on any number of processes."""

        def convert(_: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
            owners = [(p, group) for group in self.param_groups for p in group["params"]]
            for number, (p, group) in enumerate(owners):
                if saved["state"].get(number):
                    saved["state"][number] = self.saved_state(p, group, saved["state"][number])
            saved["param_groups"] = [_to_save(group) for group in saved["param_groups"]]

        hook = self.register_state_dict_post_hook(convert, prepend=True)  # runs before the user's own
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any], assign: bool = False) -> None:
        """As ``torch.optim.Optimizer.load_state_dict``, but every tensor keeps its own dtype and is a copy.

        torch casts state to the parameter's dtype, which would round fp32 moments of bf16 parameters, and shares
        tensors with ``state_dict``. Raises ValueError, before anything is changed, where the state is not one of
        this optimizer for parameters of these shapes. With ``assign``, a word of ``nn.Module.load_state_dict``, tensors
        that are where they belong are kept and not copied, for a state that was read to be loaded and nothing else.

        The classes that galore-torch, apollo-torch and fira publish too take their ``state_dict()`` as it is, and go on
        with their arithmetic; ``gracile.optim.read_published`` reads it from a file.
        """
        saved_state: dict[int, dict[str, Tensor]] = {}  # by position among all parameters

        def withhold(_: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            if _sizes(self.param_groups) != _sizes(saved["param_groups"]):
                return saved  # torch refuses it
            # A key that was not saved keeps its present value: another optimizer's groups must not lose the rank.
            groups = [
                {key: own[key] for key in self.defaults}
                | {**self.later_keys, **self.with_own_names(_with_dtypes(other))}
                | {key: own[key] for key in OWN_KEYS}
                for own, other in zip(self.param_groups, saved["param_groups"], strict=True)
            ]
            saved_state.update(self._checked_state(by_position(saved), groups))
            return {**saved, "state": {}, "param_groups": groups}

        def restore(_: torch.optim.Optimizer) -> None:
            owners = [(p, group) for group in self.param_groups for p in group["params"]]
            for number, state in saved_state.items():
                p, group = owners[number]
                self.state[p] = self.taken_over(p, group, state, assign)
            self.forget()

        before = self.register_load_state_dict_pre_hook(withhold)  # runs after the user's own
        after = self.register_load_state_dict_post_hook(restore, prepend=True)  # runs before the user's own
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def taken_over(
        self, p: Tensor, group: dict[str, Any], saved: Mapping[str, Tensor], assign: bool = False
    ) -> dict[str, Tensor]:
        """What this process holds of a parameter's saved state, where it belongs and sharing nothing with it, or with
        ``assign`` whole tensors of it."""
        on_host = self.host_keys(p, group)
        return {
            key: value.to("cpu" if key in on_host else p.device, copy=not (assign and _is_whole(value)))
            for key, value in self.loaded_state(p, group, saved).items()
        }

    def _checked_state(
        self, saved_state: Mapping[int, Mapping[str, Any]], saved_groups: list[dict[str, Any]]
    ) -> dict[int, dict[str, Tensor]]:
        """Saved states in their form here, compared with those this optimizer would create: none of these is made."""
        for group in saved_groups:
            self.check_keys(group)
            self.check_values(group)
        # The saved rank counts: loading restores the saved groups too.
        owners = [
            (p, {**saved, "params": group["params"]})
            for group, saved in zip(self.param_groups, saved_groups, strict=True)
            for p in group["params"]
        ]
        checked = {}
        for number, theirs in saved_state.items():
            p, group = owners[number]
            state = self.own_form(p, group, theirs)
            if state is None:
                continue
            checked[number] = state
            expected = self.expected_state(p, group, state)
            if expected is None:
                continue
            saved = {k: tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for k, v in state.items()}
            if saved != expected:
                raise ValueError(
                    f"the saved state of parameter {number} does not fit {type(self).__name__} on a parameter of "
                    f"shape {tuple(p.shape)}: it holds {saved}, expected {expected}; load it into the optimizer and "
                    "model that saved it"
                )
        return checked


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor has its memory for itself."""
    return tensor.untyped_storage().nbytes() == tensor.nbytes


def _sizes(groups: list[dict[str, Any]]) -> list[int]:
    return [len(group["params"]) for group in groups]


def by_position(state_dict: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """The states of a ``state_dict()`` by the position of their parameter among all."""
    places = {i: number for number, i in enumerate(i for group in state_dict["param_groups"] for i in group["params"])}
    return {places[i]: state for i, state in state_dict["state"].items() if i in places}


def tensors_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """Saved state whose counter is a tensor, which before torch 1.12 was a number, and without the empty mappings that
    torch.distributed.checkpoint has for what is held and was not saved."""
    given = {key: value for key, value in state.items() if value != {}}
    step = given.get("step")
    if isinstance(step, (int, float)):
        given["step"] = torch.tensor(float(step), dtype=torch.float32, device="cpu")
    return given


def _to_save(group: Mapping[str, Any]) -> dict[str, Any]:
    """A saved group with the names of dtypes: torch.distributed.checkpoint knows numbers and texts. How this run takes
    its steps says nothing to another."""
    kept = {key: value for key, value in group.items() if key != "capturable"}
    return {key: str(value) if isinstance(value, torch.dtype) else value for key, value in kept.items()}


def _with_dtypes(group: Mapping[str, Any]) -> dict[str, Any]:
    """A saved group with dtypes where names of them were saved."""
    name = group.get("state_dtype")
    if not isinstance(name, str):
        return dict(group)
    return {**group, "state_dtype": getattr(torch, name.removeprefix("torch."), name)}
