"""The optimizer state that processes hold of a LLaMA under DeepSpeed's engine, after one step."""

import cells
from catalogue import VARIANTS
from cells import convert, deepspeed, dist, torch
from mixtures import build_mixture

from gracile.models import build_llama
from gracile.optim import param_groups, state_bytes
from gracile.optim.distributed import as_one_buffer, each_alone
from gracile.optim.memory import planned_state_by_kind


def llama(cell):
    if "mixture" in cell:
        return build_mixture(cell["mixture"], hidden_size=128, intermediate_size=344, vocab_size=512, experts=8)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3, "vocab_size": 512}
    model = build_llama("2m", num_attention_heads=4, **sizes)
    if layer := VARIANTS[cell["optimizer"]].layer:
        convert(model, layer.cls, rank=32, **layer.keys)
    return model


def made(model, cell):
    kind, (keys, matrix_keys) = VARIANTS[cell["optimizer"]].cls, VARIANTS[cell["optimizer"]].cells
    if matrix_keys is None:
        return kind(param_groups(model), **keys)
    if "role" in matrix_keys:  # by the names of another net
        return kind(param_groups(model, role="auto"), **keys)
    ranked = {} if "sparsity" in matrix_keys else {"rank": 32}
    return kind(param_groups(model, **ranked, **matrix_keys, **cell["keys"]), **keys)


def stepped(model, optimizer):
    """One step of one process."""
    tokens = torch.randint(512, (2, 16), generator=torch.Generator().manual_seed(0))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    return optimizer


def basis_bytes(optimizer):
    return sum(v.nbytes for s in optimizer.state.values() for k, v in s.items() if k.startswith("basis"))


def planned_bytes(cell):
    """What this process will hold, known before there is an engine."""
    with torch.device("meta"):
        optimizer = made(llama(cell), cell)
    cut = each_alone if cell["stage"] == 3 else as_one_buffer
    return planned_state_by_kind(optimizer, cut, dist.get_rank(), dist.get_world_size(), torch.float32).total()


def measured(cell):
    told = {}
    if dist.get_rank() == 0:
        model = llama(cell)
        alone = stepped(model, made(model, cell))
        told = {"alone": state_bytes(alone), "basis": basis_bytes(alone)}
    model = llama(cell)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": cell["stage"], "stage3_param_persistence_threshold": 0},
    }
    optimizer = made(model, cell)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    tokens = torch.randint(512, (1, 16), generator=torch.Generator().manual_seed(dist.get_rank()))
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    planned = planned_bytes(cell)
    held = torch.tensor([state_bytes(optimizer), -state_bytes(optimizer), abs(planned - state_bytes(optimizer))])
    dist.all_reduce(held, dist.ReduceOp.MAX)
    engine.destroy()
    return {**told, "most": held[0].item(), "least": -held[1].item(), "off plan": held[2].item()}


def measure(todo):
    cells.start()
    return [measured(cell) for cell in todo]
