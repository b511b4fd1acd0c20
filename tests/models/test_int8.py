"""Layers whose weights are kept in 8 bits: as ordinary layers with the opened weight, saved as plain tensors."""

import copy
import gc
import io
import weakref

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from torch.utils.checkpoint import checkpoint

from gracile.int8_weight import Int8Weight
from gracile.models import int8
from gracile.models.int8 import Int8Embedding, Int8Linear, dequantize_weights, quantize_weights


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 300, padding_idx=2), nn.Linear(300, 24), nn.Linear(24, 11, bias=False)).to(
        dtype
    )


IDS = torch.tensor([[1, 2, 5], [5, 5, 10]])


def losses_and_gradients(model):
    loss = model(IDS).float().square().sum()
    loss.backward()
    return loss, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_ordinary_layers_of_the_opened_weights(dtype):
    held = quantize_weights(net(dtype))
    ordinary = dequantize_weights(copy.deepcopy(held))
    assert [type(layer) for layer in ordinary] == [nn.Embedding, nn.Linear, nn.Linear]
    (loss, gradients), (wanted, theirs) = losses_and_gradients(held), losses_and_gradients(ordinary)
    assert torch.equal(loss, wanted)
    for mine, own in zip(gradients, theirs, strict=True):
        assert type(mine) is torch.Tensor
        assert mine.dtype == dtype
        assert torch.equal(mine, own)


def test_hooks_see_whole_gradients_and_nothing_opened_is_kept():
    held, seen = quantize_weights(net()), []
    held[1].weight.register_post_accumulate_grad_hook(lambda p: seen.append((type(p), tuple(p.grad.shape))))
    out = held(IDS)
    gc.collect()
    wide = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.is_floating_point() and t.dim() == 2]
    assert not [t for t in wide if tuple(t.shape) in ((24, 300), (11, 24))]
    out.sum().backward()
    assert seen == [(Int8Weight, (24, 300))]


def test_mixed_precision_casts_as_for_ordinary_layers():
    held = quantize_weights(net())
    ordinary = dequantize_weights(copy.deepcopy(held))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(held(IDS), ordinary(IDS))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    layer, x = quantize_weights(nn.Sequential(nn.Linear(30, 8)))[0], torch.randn(4, 30, requires_grad=True)
    layer(x).square().sum().backward()
    wanted, layer.weight.grad = layer.weight.grad, None
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(layer.weight.grad, wanted)


def test_compiled():
    layer, x = quantize_weights(nn.Sequential(nn.Linear(300, 8)))[0], torch.randn(4, 300, requires_grad=True)
    layer(x).square().sum().backward()
    wanted, layer.weight.grad = layer.weight.grad, None
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    assert torch.allclose(layer.weight.grad, wanted)


def test_what_is_tied_stays_tied_and_what_is_frozen_frozen():
    model = net()
    model[2] = nn.Linear(300, 11, bias=False)
    model[2].weight = model[0].weight
    model[1].weight.requires_grad_(False)
    quantize_weights(model)
    assert model[2].weight is model[0].weight
    assert not model[1].weight.requires_grad
    dequantize_weights(model)
    assert model[2].weight is model[0].weight


def test_saved_as_plain_tensors(tmp_path):
    held, other = quantize_weights(net(torch.bfloat16)), quantize_weights(net(torch.bfloat16))
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    state = held.state_dict()
    assert list(state) == [
        "0.weight_codes",
        "0.weight_scales",
        "1.bias",
        "1.weight_codes",
        "1.weight_scales",
        "2.weight_codes",
        "2.weight_scales",
    ]
    assert {type(value) for value in state.values()} == {torch.Tensor}
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    for read in (torch.load(file, weights_only=True), load(save(state))):
        other.load_state_dict(read)
        for p, q in zip(held.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)
    with torch.device("meta"):
        empty = quantize_weights(net(torch.bfloat16))
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty(IDS), held(IDS))


def test_states_of_another_form_are_refused():
    held, ordinary = quantize_weights(net()), net()
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"0.weight_codes\""):
        ordinary.load_state_dict(held.state_dict())
    with pytest.raises(RuntimeError, match=r"1.weight is an ordinary weight, and this layer keeps its in 8 bits"):
        held.load_state_dict(ordinary.state_dict())
    with pytest.raises(RuntimeError, match=r"in this layer of \(\(24, 300\), \(24, 5\)\)"):
        quantize_weights(net(), group_size=64).load_state_dict(held.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"1.weight_scales\""):
        held.load_state_dict({k: v for k, v in held.state_dict().items() if k != "1.weight_scales"})


def test_a_weight_that_something_replaced_is_an_error():
    layer = Int8Linear(8, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 8))
    with pytest.raises(TypeError, match="the weight of this Int8Linear was replaced by a Parameter: DeepSpeed"):
        layer(torch.zeros(1, 8))


def test_some_layers_and_refusals():
    model = quantize_weights(nn.ModuleDict({"up": nn.Linear(8, 4), "down": nn.Linear(4, 8)}), ["up"])
    assert [type(layer) for layer in model.values()] == [Int8Linear, nn.Linear]
    with pytest.raises(ValueError, match=r"LayerNorm has no nn.Linear and no nn.Embedding"):
        quantize_weights(nn.LayerNorm(4))
    with pytest.raises(ValueError, match="0 is an embedding with max_norm"):
        quantize_weights(nn.Sequential(nn.Embedding(4, 4, max_norm=1.0)))
    with pytest.raises(ValueError, match="group_size"):
        Int8Embedding(4, 4, group_size=0)


def test_one_at_a_time():
    """What has been quantized is freed before the next one is."""
    model, alive = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4))), []
    old = [weakref.ref(layer.weight) for layer in model]
    made = int8.quantize

    def counted(weight, group_size):
        gc.collect()
        alive.append(sum(weight() is not None for weight in old))
        return made(weight, group_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "quantize", counted)
        quantize_weights(model)
    assert alive == [4, 3, 2, 1]
