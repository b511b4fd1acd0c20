"""The wide, sparse MLP: the dense model's weights to the last one, and its residual stream."""

import pytest
import torch

from gracile.models import build_llama, llama_config
from gracile.models.wide import wide
from gracile.optim import SETAdamW, param_groups

TINY = {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "vocab_size": 64}


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("size", ["2m", "100m", "1b", "7b"])
def test_widths_and_densities_give_the_dense_count(size, sparsity):
    dense = llama_config(size)
    overrides, own = wide(size, sparsity)
    sparse = llama_config(size, **overrides)
    assert sparse.intermediate_size % 8 == 0
    changed = {k for k, v in dense.to_dict().items() if sparse.to_dict()[k] != v}
    assert changed == {"intermediate_size"}, "the residual stream and attention stay"
    weights = sparse.hidden_size * sparse.intermediate_size
    assert round((1 - own) * weights) == dense.hidden_size * dense.intermediate_size
    assert own == pytest.approx(sparsity, abs=8 / sparse.intermediate_size)


def test_masked_it_has_the_dense_models_weights_through_changes_of_the_masks():
    torch.manual_seed(0)
    overrides, sparsity = wide("2m", 0.75, **TINY)
    assert overrides == {**TINY, "intermediate_size": 352}
    model = build_llama("2m", **overrides)
    optimizer = SETAdamW(param_groups(model, sparsity=sparsity, target_modules=["mlp"]), update_every=2, t_end=6)
    tokens = torch.randint(64, (2, 16))
    for _ in range(5):
        optimizer.zero_grad()
        output = model(tokens, labels=tokens, output_hidden_states=True)
        output.loss.backward()
        optimizer.step()
    assert {h.shape for h in output.hidden_states} == {(2, 16, 32)}
    dense = build_llama("2m", **TINY)
    assert sum(map(torch.count_nonzero, model.parameters())) == sum(p.numel() for p in dense.parameters())


def test_at_sparsity_zero_it_is_the_dense_model():
    odd = {**TINY, "intermediate_size": 86}  # no multiple of 8, which stays
    overrides, sparsity = wide("2m", 0.0, **odd)
    assert (overrides, sparsity) == (odd, 0.0)
    torch.manual_seed(0)
    dense = build_llama("2m", **odd)
    torch.manual_seed(0)
    model = build_llama("2m", **overrides)
    SETAdamW(param_groups(model, sparsity=sparsity, target_modules=["mlp"]), t_end=6)
    tokens = torch.randint(64, (2, 16))
    assert torch.equal(model(tokens).logits, dense(tokens).logits)


def test_bad_values_get_one_line():
    with pytest.raises(ValueError, match=r"sparsity must be a number in \[0, 1\), got 1"):
        wide("2m", 1)
    with pytest.raises(ValueError, match="unknown model size '2mm'"):
        wide("2mm", 0.5)
