"""A model with peft's LoRA for the tests of SparseLoRA, and a pass of it in which some tokens have labels."""

import torch
from adapted import ids, llama
from peft import LoraConfig, get_peft_model

MLP = ["gate_proj", "up_proj", "down_proj"]


def lora(targets=MLP, dtype=torch.float32, **keys):
    torch.manual_seed(0)
    model = get_peft_model(llama(dtype=dtype), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **keys))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1, generator=generator)
    return model.train()


def labels(x, first=4):
    """Of the last tokens alone."""
    out = x.clone()
    out[:, :-first] = -100
    return out


def step(model, **keys):
    model.zero_grad()
    x = ids()
    out = model(input_ids=x, labels=labels(x, **keys))
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out, grads
