"""A model's parameters as groups: every trainable one owned once, in the group where it belongs."""

from collections import Counter

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from gracile.models import build_llama
from gracile.optim import GaLoreAdamW, param_groups

# ---- models ---------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.attn = nn.Linear(12, 20)
        self.mlp = nn.ModuleDict({"up": nn.Linear(20, 30), "down": nn.Linear(30, 12, bias=False)})


class Small(nn.Module):
    """Two blocks, an embedding, a convolution and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 12)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.conv = nn.Conv1d(12, 12, 3)
        self.head = nn.Linear(12, 16, bias=False)


def gpt2():
    """Its linear layers are Conv1D: weights of shape in x out. Its output layer is its embedding."""
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=48, n_positions=32))


@pytest.fixture(scope="module")
def llama():
    return build_llama("2m")


# ---- helpers --------------------------------------------------------------------------------------------------------


def names_in(model, group):
    """First names of a group's parameters, sorted."""
    names = {id(p): name for name, p in model.named_parameters()}
    return sorted(names[id(p)] for p in group["params"])


def assert_owned_once(model, groups):
    owners = Counter(id(p) for group in groups for p in group["params"])
    assert owners == Counter({id(p): 1 for p in model.parameters() if p.requires_grad})


def ranked_names(model, target_modules, rank=4):
    groups = param_groups(model, rank, target_modules)
    assert_owned_once(model, groups)
    return names_in(model, groups[0])


def blocks(*leaves):
    return sorted(f"blocks.{i}.{leaf}.weight" for i in range(2) for leaf in leaves)


# ---- three groups ---------------------------------------------------------------------------------------------------


def test_matrices_other_weights_norms_and_biases():
    model = Small()
    matrices, others, small = param_groups(model, 4, update_proj_gap=50, scale=0.5, weight_decay=0.1)
    assert_owned_once(model, [matrices, others, small])
    assert names_in(model, matrices) == blocks("attn", "mlp.up", "mlp.down")
    assert names_in(model, others) == ["conv.weight", "embed.weight", "head.weight"]
    biases = [f"blocks.{i}.{leaf}.bias" for i in range(2) for leaf in ("attn", "mlp.up", "norm")]
    assert names_in(model, small) == sorted([*biases, "blocks.0.norm.weight", "blocks.1.norm.weight", "conv.bias"])
    assert {k: v for k, v in matrices.items() if k != "params"} == {
        "rank": 4,
        "update_proj_gap": 50,
        "scale": 0.5,
        "weight_decay": 0.1,
    }
    assert {k: v for k, v in others.items() if k != "params"} == {"weight_decay": 0.1}
    assert {k: v for k, v in small.items() if k != "params"} == {"weight_decay": 0.0}


def test_norms_and_biases_do_not_decay_even_where_the_optimizer_does():
    model = Small()
    optimizer = GaLoreAdamW(param_groups(model, 4), weight_decay=0.3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3, 0.0]
    for p in model.parameters():
        p.data.fill_(1.0)
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        kept = name.endswith("bias") or "norm" in name
        assert torch.allclose(p, torch.full_like(p, 1.0 if kept else 1 - 0.001 * 0.3))


def test_parameters_keep_the_order_of_the_model():
    model = Small()
    order = [id(p) for p in model.parameters()]
    for group in param_groups(model, 4):
        places = [order.index(id(p)) for p in group["params"]]
        assert places == sorted(places)


def test_a_group_that_would_be_empty_is_left_out():
    model = nn.Sequential(nn.Linear(12, 20, bias=False))
    (only,) = param_groups(model, 4, "all-linear")
    assert only["params"] == [model[0].weight]


def test_without_a_rank_the_groups_suit_torch_too():
    model = Small()
    weights, small = param_groups(model, weight_decay=0.1)
    assert_owned_once(model, [weights, small])
    assert all(p.dim() > 1 for p in weights["params"])
    assert all(p.dim() <= 1 for p in small["params"])
    assert weights.keys() == small.keys() == {"params", "weight_decay"}
    assert {group["rank"] for group in GaLoreAdamW([weights, small]).param_groups} == {None}
    torch.optim.AdamW([weights, small])  # last, as it writes its defaults into the groups


def test_matrix_keys_without_a_rank_are_refused():
    with pytest.raises(ValueError, match=r"scale, update_proj_gap need a rank \(or one of .*\), got rank=None"):
        param_groups(Small(), update_proj_gap=50, scale=0.5)


def test_a_misspelt_matrix_key_is_refused_by_the_optimizer():
    groups = param_groups(Small(), 4, update_proj_gpa=50)
    with pytest.raises(ValueError, match="'update_proj_gpa' = 50; did you mean 'update_proj_gap'"):
        GaLoreAdamW(groups)


# ---- transformers ---------------------------------------------------------------------------------------------------


def test_llama(llama):
    matrices, others, norms = param_groups(llama, 8)
    assert_owned_once(llama, [matrices, others, norms])
    leaves = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    expected = sorted(f"model.layers.{i}.{leaf}.weight" for i in range(4) for leaf in leaves)
    assert names_in(llama, matrices) == expected
    assert names_in(llama, others) == ["lm_head.weight", "model.embed_tokens.weight"]
    assert len(norms["params"]) == 9
    assert norms["weight_decay"] == 0.0


def test_all_linear_leaves_out_embedding_and_output_layer(llama):
    assert ranked_names(llama, "all-linear") == ranked_names(llama, ["attn", "mlp"])


def test_gpt2_conv1d_layers_are_matrices_and_the_tied_embedding_is_owned_once():
    model = gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    matrices, others, small = param_groups(model, 4)
    assert_owned_once(model, [matrices, others, small])
    leaves = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert names_in(model, matrices) == sorted(f"transformer.h.{i}.{leaf}.weight" for i in range(2) for leaf in leaves)
    assert names_in(model, others) == ["transformer.wpe.weight", "transformer.wte.weight"]
    assert len(small["params"]) == 2 * (4 + 4) + 2
    assert ranked_names(model, "all-linear") == names_in(model, matrices)


@pytest.mark.parametrize("make", [lambda: build_llama("2m", num_hidden_layers=1), gpt2], ids=["llama", "gpt2"])
def test_the_groups_train_a_model(make):
    torch.manual_seed(0)
    model = make()
    optimizer = GaLoreAdamW(param_groups(model, 4, scale=1.0, update_proj_gap=3), lr=0.01)
    tokens = torch.randint(0, 48, (2, 16))
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    with_basis = {id(p) for p, state in optimizer.state.items() if "basis" in state}
    assert with_basis == {id(p) for p in optimizer.param_groups[0]["params"]}


def test_tied_embeddings_of_llama_are_owned_once():
    model = build_llama("2m", num_hidden_layers=1, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for target_modules in (["attn", "mlp"], "all-linear"):
        matrices, others, norms = param_groups(model, 4, target_modules)
        assert_owned_once(model, [matrices, others, norms])
        assert len(matrices["params"]) == 7
        assert names_in(model, others) == ["model.embed_tokens.weight"]


def test_two_layers_that_share_a_weight_give_one_matrix():
    model = Small()
    model.blocks[1].attn.weight = model.blocks[0].attn.weight
    assert ranked_names(model, ["attn"]) == ["blocks.0.attn.weight"]
    assert ranked_names(model, ["blocks.1.attn"]) == ["blocks.0.attn.weight"]


# ---- patterns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["attn"], blocks("attn")),
        (("attn", "down"), blocks("attn", "mlp.down")),
        (["blocks.1.mlp"], ["blocks.1.mlp.down.weight", "blocks.1.mlp.up.weight"]),
        ([r"blocks\.0\..*"], ["blocks.0.attn.weight", "blocks.0.mlp.down.weight", "blocks.0.mlp.up.weight"]),
        (["attn", "attn"], blocks("attn")),
        (["head"], ["head.weight"]),
        ((p for p in ["up"]), blocks("mlp.up")),
        (r".*\.(attn|down)", blocks("attn", "mlp.down")),
        (r"blocks\.1\.attn", ["blocks.1.attn.weight"]),
        ("head", ["head.weight"]),
        ("all-linear", [*blocks("attn", "mlp.up", "mlp.down"), "head.weight"]),
        (["all-linear"], [*blocks("attn", "mlp.up", "mlp.down"), "head.weight"]),
    ],
    ids=lambda value: str(value).split(" at 0x")[0],  # workers must agree on the names
)
def test_patterns(patterns, expected):
    """In a list, a part of the name or a regular expression for all of it; alone, only the latter."""
    assert ranked_names(Small(), patterns) == sorted(expected)


ALL = "'all-linear' takes every linear layer but the output"


def test_a_lone_string_must_match_the_whole_name():
    with pytest.raises(ValueError, match="'attn' matches no trainable linear layer; did you mean 'attn'"):
        param_groups(Small(), 4, "attn")


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("atn", "did you mean 'attn'?"),
        ("haed", "did you mean 'head'?"),
        ("xyz", f"known: attn, blocks, down, head, mlp, up; {ALL}"),
        (r"blocks\.7\..*", "did you mean 'blocks'?"),
        ("embed", f"known: attn, blocks, down, head, mlp, up; {ALL}"),  # an embedding is no linear layer
        ("norm", f"known: attn, blocks, down, head, mlp, up; {ALL}"),
        ("conv", f"known: attn, blocks, down, head, mlp, up; {ALL}"),
    ],
)
def test_a_pattern_that_matches_nothing_is_named_with_the_nearest_name(pattern, hint):
    with pytest.raises(ValueError, match="target_modules") as refused:
        param_groups(Small(), 4, ["attn", pattern])
    assert str(refused.value) == f"target_modules: {pattern!r} matches no trainable linear layer; {hint}"


def test_a_misspelt_pattern_on_llama(llama):
    with pytest.raises(ValueError, match="'self_atn' matches no trainable linear layer; did you mean 'self_attn'"):
        param_groups(llama, 4, ["self_atn", "mlp"])


@pytest.mark.parametrize("empty", [[], ()])
def test_an_empty_list_is_refused(empty):
    with pytest.raises(ValueError, match="target_modules is empty"):
        param_groups(Small(), 4, empty)


@pytest.mark.parametrize("target_modules", ["attn(", ["mlp", "attn("]])
def test_a_bad_regular_expression_is_refused(target_modules):
    with pytest.raises(ValueError, match=r"target_modules: 'attn\(' is not a regular expression"):
        param_groups(Small(), 4, target_modules)


# ---- frozen parameters ----------------------------------------------------------------------------------------------


def test_frozen_layers_are_left_out():
    model = Small()
    model.blocks[0].requires_grad_(False)
    model.embed.requires_grad_(False)
    groups = param_groups(model, 4)
    assert_owned_once(model, groups)
    assert names_in(model, groups[0]) == ["blocks.1.attn.weight", "blocks.1.mlp.down.weight", "blocks.1.mlp.up.weight"]
    assert names_in(model, groups[1]) == ["conv.weight", "head.weight"]


def test_a_frozen_weight_with_a_trainable_bias():
    model = Small()
    model.blocks[0].attn.weight.requires_grad_(False)
    groups = param_groups(model, 4)
    assert_owned_once(model, groups)
    assert "blocks.0.attn.bias" in names_in(model, groups[2])


def test_a_pattern_that_matches_frozen_layers_only_is_refused():
    model = Small()
    for block in model.blocks:
        block.attn.requires_grad_(False)
    with pytest.raises(ValueError, match="'attn' matches no trainable linear layer"):
        param_groups(model, 4)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match="'attn' matches no trainable linear layer"):
        param_groups(nn.Sequential(nn.Embedding(4, 4)), 2)


def test_an_output_layer_tied_to_an_embedding_is_no_target():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.bag = nn.Embedding(9, 4), nn.EmbeddingBag(9, 4)
            self.middle, self.head = nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embedding.weight

    model = Tied()
    ranked, *_ = param_groups(model, rank=2, target_modules="all-linear")
    assert [id(p) for p in ranked["params"]] == [id(model.middle.weight)]
    with pytest.raises(ValueError, match="'tpyo'"):
        param_groups(model, rank=2, target_modules=["middle", "tpyo"])


# ---- keys that differ between targets -------------------------------------------------------------------------------


def test_a_mapping_splits_the_ranked_group_by_name(llama):
    """The first pattern that matches counts; targets that match none go without the key."""
    mapping = {"k_proj": 2, "attn": 4}
    groups = param_groups(llama, 8, num_heads=mapping, scale=0.5)
    assert_owned_once(llama, groups)
    ranked = [group for group in groups if group.get("rank")]
    assert all(group["scale"] == 0.5 and group["rank"] == 8 for group in ranked)
    heads = {name: group.get("num_heads") for group in ranked for name in names_in(llama, group)}
    assert len(heads) == 7 * llama.config.num_hidden_layers
    for name, number in heads.items():
        assert number == (2 if "k_proj" in name else 4 if "attn" in name else None), name
    assert len(ranked) == 3


def test_a_mapping_that_matches_nothing_raises(llama):
    with pytest.raises(ValueError, match="num_heads: 'q_prj' matches no trainable linear layer; did you mean 'q_proj'"):
        param_groups(llama, 8, num_heads={"q_prj": 4})


def test_a_mapping_with_a_pattern_that_is_none_names_its_key(llama):
    with pytest.raises(ValueError, match=r"num_heads: '\(' is not a regular expression"):
        param_groups(llama, 8, num_heads={"(": 4})


def test_a_mapping_owns_a_weight_that_two_layers_share_once():
    model = Small()
    model.blocks[1].attn.weight = model.blocks[0].attn.weight
    groups = param_groups(model, 4, scale={"attn": 0.5, "mlp": 1.0})
    assert_owned_once(model, groups)
    assert [group.get("scale") for group in groups] == [0.5, 1.0, None, None]
