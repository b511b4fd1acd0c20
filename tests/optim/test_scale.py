"""SCALE: against the paper's loop in fp64, what is one and what changes nothing, its groups, its state."""

import pytest
import torch
from torch import nn

from gracile.models import build_llama
from gracile.optim import SCALE, param_groups, state_bytes
from gracile.optim.distributed import RowShard, ShardRange
from gracile.optim.distributed.process_group import FakeGroup
from gracile.optim.distributed.workspace import Workspace
from tests.oracle.scale import scale

ROLES = ("linear", "transposed", "embedding", "head")
SHAPES = {"tall": (40, 24), "wide": (24, 40), "square": (32, 32), "row": (1, 7), "column": (7, 1)}

by_role = pytest.mark.parametrize("role", ROLES)
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def weight(*shape, seed=0, dtype=torch.float64):
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def gradients(*shape, steps=12, seed=1, dtype=torch.float64):
    """Of sizes that differ from row to row and from column to column."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randn(shape[0], 1, generator=generator), torch.randn(shape[1], generator=generator)
    sizes = (2 * rows).exp() * (2 * columns).exp()
    return [(torch.randn(*shape, generator=generator) * sizes).to(dtype) for _ in range(steps)]


def follow(optimizer, parameter, sequence):
    trajectory = []
    for G in sequence:
        parameter.grad = G.clone()
        optimizer.step()
        trajectory.append(parameter.detach().clone())
    return torch.stack(trajectory)


# ---- against the paper's loop ---------------------------------------------------------------------------------------


@by_role
@by_shape
@pytest.mark.parametrize("norm", ["rms", "l2"])
def test_it_is_the_papers_loop(role, shape, norm):
    W, sequence = weight(*shape), gradients(*shape)
    expected = scale(W.detach(), sequence, role, lr=0.03, beta=0.8, decay=0.2, norm=norm)
    optimizer = SCALE([W], lr=0.03, role=role, momentum=0.8, weight_decay=0.2, norm=norm)
    torch.testing.assert_close(follow(optimizer, W, sequence), expected, rtol=1e-12, atol=1e-13)


@by_role
@by_shape
def test_bf16_weights_are_off_by_their_own_roundings(role, shape):
    """Squares, means and the moment are fp32: only the weight is rounded, by 2^-9 of itself, twice a step."""
    W, sequence = weight(*shape, dtype=torch.bfloat16), gradients(*shape, dtype=torch.bfloat16)
    expected = scale(W.detach(), sequence, role, lr=0.03, decay=0.1)
    got = follow(SCALE([W], lr=0.03, role=role, weight_decay=0.1), W, sequence)
    size = expected.abs().amax(0)
    assert ((got[-1].double() - expected[-1]).abs() <= 2 * len(sequence) * 2**-8 * (size + 0.03)).all()
    one = weight(*shape, dtype=torch.bfloat16)
    first = follow(SCALE([one], lr=1.0, role=role), one, sequence[:1])[0].double()
    exact = scale(weight(*shape, dtype=torch.bfloat16).detach(), sequence[:1], role, lr=1.0)[0]
    torch.testing.assert_close(first, exact, rtol=2**-8, atol=1e-6)


def test_without_a_role_it_is_adamw_at_a_scaled_rate():
    for shape in ((9,), (9, 5), (3, 2, 2)):
        W, X = weight(*shape), weight(*shape)
        generator = torch.Generator().manual_seed(2)
        sequence = [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(8)]
        got = follow(SCALE([W], lr=0.01, adam_scale=20.0), W, sequence)
        expected = follow(torch.optim.AdamW([X], lr=0.2, weight_decay=0.0), X, sequence)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    W, X = weight(9), weight(9)
    sequence = [torch.randn(9, dtype=torch.float64) for _ in range(8)]
    got = follow(SCALE([W], lr=0.01, weight_decay=0.3), W, sequence)
    torch.testing.assert_close(got, follow(torch.optim.AdamW([X], lr=0.01, weight_decay=0.3), X, sequence))


# ---- properties -----------------------------------------------------------------------------------------------------


@by_role
@pytest.mark.parametrize("norm", ["rms", "l2"])
def test_every_output_moves_by_one_learning_rate(role, norm):
    W, sequence = weight(40, 24), gradients(40, 24, steps=4)
    before = W.detach().clone()
    after = follow(SCALE([W], lr=0.5, role=role, norm=norm), W, sequence)
    along = 1 if role in ("linear", "head") else 0
    for U in torch.diff(torch.cat([before[None], after]), dim=0) / 0.5:
        sums = U.square().sum(along) if norm == "l2" else U.square().mean(along)
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-12, atol=0)


@by_role
def test_scaling_gradients_by_a_power_of_two_changes_no_bit(role):
    one, other = weight(9, 5, dtype=torch.float32), weight(9, 5, dtype=torch.float32)
    sequence = gradients(9, 5, dtype=torch.float32)
    scaled = [8 * G for G in sequence]
    assert torch.equal(follow(SCALE([one], role=role), one, sequence), follow(SCALE([other], role=role), other, scaled))


@by_role
def test_only_the_head_remembers(role):
    """The same last gradient, another history."""
    (G, *_), ends = gradients(6, 4), []
    for first in gradients(6, 4, steps=2, seed=5):
        W = weight(6, 4)
        optimizer = SCALE([W], lr=0.1, role=role)
        before = follow(optimizer, W, [first])[0]
        ends.append(follow(optimizer, W, [G])[0] - before)
    alike = torch.allclose(*ends, rtol=1e-9, atol=1e-12)
    assert alike == (role != "head")


def test_inputs_in_another_order_are_moved_in_that_order_and_an_outputs_scale_does_not_matter():
    order, factors = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([1e-3, 1.0, 7.0, 1e4])[:, None].double()
    W, (G,) = weight(4, 5), gradients(4, 5, steps=1)
    V, X = nn.Parameter(W.detach()[:, order].clone()), nn.Parameter(W.detach().clone())
    (moved,) = follow(SCALE([W], lr=0.1, role="linear"), W, [G])
    torch.testing.assert_close(follow(SCALE([V], lr=0.1, role="linear"), V, [G[:, order]])[0], moved[:, order])
    torch.testing.assert_close(follow(SCALE([X], lr=0.1, role="linear"), X, [factors * G])[0], moved)


@by_role
def test_zeros_stay_where_they_are_and_small_numbers_are_not_blown_up(role):
    W, G = weight(6, 4, dtype=torch.float32), torch.zeros(6, 4)
    before = W.detach().clone()
    assert torch.equal(follow(SCALE([W], lr=0.1, role=role), W, [G])[0], before)
    small = torch.full((6, 4), 1e-12)
    (after,) = follow(SCALE([W], lr=1.0, role=role, momentum=0.0), W, [small])
    torch.testing.assert_close(before - after, torch.full((6, 4), 1e-4), rtol=1e-2, atol=1e-6)
    for huge in (1e18, 1e-30):
        assert torch.isfinite(follow(SCALE([W], lr=0.1, role=role), W, [torch.full((6, 4), huge)])).all()


def test_tokens_without_a_gradient_stay_put_and_share_no_step():
    """2 rows of 100: each moves by sqrt(50) learning rates, which is why an embedding may want a smaller one."""
    W, G = weight(100, 8), torch.zeros(100, 8, dtype=torch.float64)
    G[3], G[70] = 1.0, -1.0
    before = W.detach().clone()
    (after,) = follow(SCALE([W], lr=0.1, role="embedding"), W, [G])
    assert (after != before).any(1).nonzero().view(-1).tolist() == [3, 70]
    torch.testing.assert_close(before[3] - after[3], torch.full((8,), 0.1 * 50**0.5, dtype=torch.float64))


def test_parts_that_are_cut_within_rows_have_the_mean_of_whole_columns():
    """Shares of a sum, before they are added up: each row counts on one process."""
    G, total = gradients(7, 5, steps=1)[0].square(), torch.zeros(5, dtype=torch.float64)
    for index in range(3):
        held = ShardRange((7, 5), (0, 12, 26, 35), 0, FakeGroup(index, 3))
        first, last = -(-held.start // 5) - bool(held.start % 5), -(-held.stop // 5)
        own = G.view(-1)[held.start : held.stop]
        shard = RowShard(own, own, held, 0, Workspace())
        assert shard.lines == (first, last)
        torch.testing.assert_close(shard.mean(G[first:last], -1), G[first:last].mean(-1))
        total += shard.mean(G[first:last], -2)
    torch.testing.assert_close(total, G.mean(0))


# ---- state ----------------------------------------------------------------------------------------------------------


@by_role
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_the_heads_moment(role, dtype):
    W = weight(40, 24, dtype=dtype)
    optimizer = SCALE([W], role=role)
    follow(optimizer, W, gradients(40, 24, steps=1, dtype=dtype))
    moments = 4 * 40 * 24 if role == "head" else 0
    assert state_bytes(optimizer) == moments + 4 == SCALE.state_bytes_for((40, 24), dtype, role=role)
    assert SCALE.state_bytes_for((40,), dtype, role=role) == 2 * 4 * 40 + 4


# ---- groups ---------------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 48}


def roles_of(model, **keys):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group["role"] for group in param_groups(model, **keys) for p in group["params"]}


@pytest.mark.parametrize("tied", [False, True])
def test_roles_come_from_the_modules_of_a_model(tied):
    model = build_llama("2m", tie_word_embeddings=tied, num_attention_heads=4, **SMALL)
    roles = roles_of(model, role="auto")
    assert roles.keys() == dict(model.named_parameters()).keys()
    assert roles["model.embed_tokens.weight"] == ("head" if tied else "embedding")
    assert tied or roles["lm_head.weight"] == "head"
    for name, role in roles.items():
        if "proj" in name:
            assert role == "linear", name
        if "norm" in name:
            assert role is None, name
    SCALE(param_groups(model, role="auto", weight_decay=0.1))


def test_gpt2s_layers_and_embeddings_are_found_too():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=31, n_positions=8, tie_word_embeddings=False)
    roles = roles_of(GPT2LMHeadModel(config), role="auto")
    assert roles["transformer.h.0.attn.c_attn.weight"] == roles["transformer.h.0.mlp.c_fc.weight"] == "transposed"
    assert roles["transformer.wte.weight"] == roles["transformer.wpe.weight"] == "embedding"
    assert roles["lm_head.weight"] == "head"
    assert roles["transformer.h.0.attn.c_attn.bias"] is None


def test_a_pattern_names_a_role_and_what_has_none_is_refused():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5))
    with pytest.raises(ValueError, match=r"does not tell its output layer; name it, as in role={'lm_head': 'head'}"):
        param_groups(model, role="auto")
    roles = roles_of(model, role={"2": "head"}, weight_decay=0.1)
    assert roles == {"0.weight": "embedding", "1.weight": "linear", "2.weight": "head", "1.bias": None, "2.bias": None}
    assert [g["weight_decay"] for g in param_groups(model, role={"2": "head"}, weight_decay=0.1)] == [0.1, 0.1, 0.1, 0]
    assert "3.weight" not in roles_of(nn.Sequential(*model, nn.ReLU()), role={"2": "head"})
    convolution = nn.Sequential(*model, nn.Conv1d(3, 3, 2))
    with pytest.raises(ValueError, match=r"role: 3 of a Conv1d \(3, 3, 2\) has no known one; name it"):
        param_groups(convolution, role={"2": "head"})
    assert roles_of(convolution, role={"2": "head", "3": None})["3.weight"] is None


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"role": "tail"}, "role must be one of linear, transposed, embedding, head or None, got 'tail'"),
        ({"momentum": 1.0}, r"momentum must be a number in \[0, 1\), got 1.0"),
        ({"norm": "l1"}, "norm must be one of rms, l2, got 'l1'"),
        ({"norm_eps": 0.0}, "norm_eps must be a number > 0, got 0.0"),
        ({"adam_scale": -1}, "adam_scale must be a number >= 0, got -1"),
        ({"lr": -1}, "lr must be a number >= 0, got -1"),
    ],
)
def test_bad_values_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        SCALE([weight(3, 3)], **keys)


def test_what_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match=r"role='linear' needs matrices, got shape \(3, 2, 2\); put it into another"):
        SCALE([weight(3, 2, 2)], role="linear")
