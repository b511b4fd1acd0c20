"""Save and load checkpoints of DeepSpeed's engine on the processes of a pool's job, and tell what came of it.

Cells are those of ``cells.py``, each with the ``folder`` of its checkpoint and what to ``do``: go on from a checkpoint,
load one that does not fit, or only start an engine.
"""

from pathlib import Path

import cells
from cells import dist, started, torch, train, weights_of_engine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

SAVED, END = 4, 8  # refreshes at 5 and at 6, after what is saved
TAG = "saved"


def tensors(nested, path=()):
    """The tensors in nested mappings and lists, as copies by their path."""
    if isinstance(nested, torch.Tensor):
        return {path: nested.detach().clone()}
    pairs = nested.items() if isinstance(nested, dict) else enumerate(nested) if isinstance(nested, list) else ()
    return {key: tensor for name, value in pairs for key, tensor in tensors(value, (*path, str(name))).items()}


def remembered(engine):
    """All tensors that the engine's optimizer saves: the state, and the weights in fp32."""
    return tensors(engine.optimizer.state_dict())


def written(cell):
    """Those tensors as they are in this process's file. DeepSpeed puts objects of these three classes beside them."""
    zero = int(cell["layout"][-1])
    pattern = f"*zero_pp_rank_{dist.get_rank()}_*optim_states.pt" if zero else "mp_rank_00_model_states.pt"
    (path,) = Path(cell["folder"], TAG).glob(pattern)
    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        held = torch.load(path, weights_only=True)
    return tensors(held["optimizer_state_dict" if zero else "optimizer"])


def same(one, other):
    """Whether two mappings hold the same tensors to the bit, in the same dtypes."""
    return one.keys() == other.keys() and all(
        (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape) and torch.equal(bits(a), bits(b))
        for a, b in ((a, other[key]) for key, a in one.items())
    )


def bits(tensor):
    """As whole numbers: NaN, which a state may hold before it has a value, is itself."""
    return tensor.reshape(-1).view(torch.uint8)


def state_dtypes(state):
    """The dtypes of each kind of tensor that the optimizer under the engine keeps."""
    told = {}
    for path, value in state.items():
        if "state" in path:
            told.setdefault(path[-1].split(".")[-1], set()).add(str(value.dtype).removeprefix("torch."))
    return {key: sorted(dtypes) for key, dtypes in told.items()}


def agreed(here):
    """What the processes found: a flag holds if it holds on all, and lists and texts are those of process 0."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, here)
    return {key: all(f[key] for f in found) if isinstance(value, bool) else value for key, value in found[0].items()}


def go_on(cell):
    """Train, save and train on; and train on once more from what a new engine loads."""
    engine, _ = started(cell)
    train(engine, cell, range(SAVED))
    engine.save_checkpoint(cell["folder"], tag=TAG, client_state={"note": [SAVED, "steps"]})
    at_save = remembered(engine)
    train(engine, cell, range(SAVED, END))
    weights, at_end = weights_of_engine(engine, cell), remembered(engine)
    engine.destroy()

    engine, _ = started(cell)
    train(engine, cell, range(100, 100 + cell.get("steps_before", 0)))
    fresh = remembered(engine)
    _, client = engine.load_checkpoint(cell["folder"])
    found = {"restored": same(at_save, remembered(engine)), "note": client["note"], "steps": engine.global_steps}
    found["written"] = same(at_save, written(cell))
    train(engine, cell, range(SAVED, END))
    found |= {
        "weights": same(weights, weights_of_engine(engine, cell)),
        "state": same(at_end, remembered(engine)),
        "changed": not same(at_save, at_end) and not same(at_save, fresh),
        "dtypes": state_dtypes(at_save),
    }
    engine.destroy()
    return agreed(found)


def load(cell):
    """What loading raises on each process, and whether the optimizer is as it was, or as the file says."""
    engine, _ = started(cell)
    train(engine, cell, range(2))
    if cell.get("saves"):
        engine.save_checkpoint(cell["folder"], tag=TAG)
        train(engine, cell, range(2, 4))
    before = remembered(engine)
    raised = raised_by(lambda: engine.load_checkpoint(cell["folder"]))
    found = {"raised": raised, "untouched": same(before, remembered(engine))}
    found["loaded"] = cell["layout"] == "zero0" and same(remembered(engine), written(cell))
    engine.destroy()
    return agreed(found)


def refused(cell):
    return {"raised": raised_by(lambda: started(cell))}


def raised_by(action):
    """The error of ``action`` on each process, as text; empty where there is none."""
    error = ""
    try:
        action()
    except Exception as refusal:
        error = f"{type(refusal).__name__}: {refusal}"
    errors = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return errors


def measure(todo):
    cells.start()
    return [{"go on": go_on, "load": load, "start": refused}[cell["do"]](cell) for cell in todo]
