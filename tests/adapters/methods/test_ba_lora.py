"""BA-LoRA: terms of classes and of tokens, through a model of each kind."""

import torch
from adapted import attached, ids
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForSequenceClassification

from gracile import adapters
from gracile.adapters.output_terms import leading_share, token_entropy


def test_the_terms_of_tokens_are_in_the_loss():
    plain = attached("balora", consistency=0.0, diversity=0.0, leading=0.0).train()
    keys = {"consistency": 0.5, "diversity": 0.3, "leading": 0.2, "k": 2}
    model = attached("balora", **keys).train()
    x = ids()
    out, expected = model(input_ids=x, labels=x), plain(input_ids=x, labels=x)
    z = expected.logits[:, :-1].flatten(0, 1)
    term = -0.3 * token_entropy(z) - 0.2 * leading_share(z, 2)  # no distance from the base at first
    assert abs(out.loss - expected.loss - term) < 1e-4
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_of_a_classifier():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_labels=5,
        pad_token_id=0,
    )  # fmt: skip
    keys = {"consistency": 1.0, "diversity": 1.0, "leading": 1.0}
    adapter = adapters.BALoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS", **keys)
    model = get_peft_model(LlamaForSequenceClassification(config), adapter).train()
    x, labels = ids(6), torch.arange(6) % 5
    loss = model(input_ids=x, labels=labels).loss
    model.eval()
    plain = model(input_ids=x, labels=labels).loss
    assert abs(loss - plain) > 1e-3
    loss.backward()
