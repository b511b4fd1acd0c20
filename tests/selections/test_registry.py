"""Selections by name, for configurations."""

import re

import pytest
from selected_models import llama

from gracile.selections import HFT, METHODS, S2FT, SaRA, selection_groups
from gracile.selections.registry import selection_method


def test_names_and_their_fields():
    assert {"hft": HFT, "s2ft": S2FT, "sara": SaRA} == METHODS
    assert selection_method("sara", share=0.1) == SaRA(share=0.1)
    keys = {"hft": {}, "s2ft": {"down_ratio": 0.1}, "sara": {"share": 0.1}}
    for name, method in METHODS.items():
        assert method.masked == ("selected" in selection_groups(llama(1), name, **keys[name])[0])


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("s3ft", {}, "selection 's3ft' is not known; did you mean 's2ft'?"),
        ("lora", {}, "selection 'lora' is not known; known: hft, s2ft, sara"),
        ("hft", {"rounds": 1}, "rounds is no field of selection hft; did you mean 'round'?"),
        ("hft", {"share": "half"}, "share must be a number in (0, 1], got 'half'"),
    ],
)
def test_a_bad_one_is_refused_in_a_line(name, keys, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$") as told:
        selection_groups(llama(1), name, **keys)
    assert "\n" not in str(told.value)
