"""Small LLaMAs that the tests of selections train."""

import torch

from gracile.models import build_llama


def llama(layers=4, heads=4, key_value_heads=2, seed=0, **keys):
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": heads}
    return build_llama("2m", vocab_size=64, num_key_value_heads=key_value_heads, **{**shape, **keys})


def loss_of(model, step=0):
    tokens = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(step))
    return model(input_ids=tokens, labels=tokens).loss


def train(model, optimizer, steps=3):
    for step in range(steps):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model, before):
    """Where each parameter is other than it was."""
    return {name: p.detach() != before[name] for name, p in model.named_parameters()}
