"""What docs/checkpoints.md says of DeepSpeed's checkpoints, done on the processes of a pool's job: its code is run."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import cells
import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal

from gracile.optim import full_state, load_full_state

PAGE = Path(__file__).resolve().parents[2] / "docs" / "checkpoints.md"
BLOCK = re.compile(r"<!-- fragment -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SAVED, END = 4, 8  # refreshes at 5 and 6


def run_block(number, **names):
    """The names that a block of the page has in the end."""
    known = {"full_state": full_state, "load_full_state": load_full_state, "torch": torch, "dist": dist}
    names |= {**known, "deepspeed": deepspeed}
    exec(BLOCK.findall(PAGE.read_text(encoding="utf-8"))[number], names)
    return names


def save(cell, folder):
    """A run, saved half way, to its end: its weights, and what ``ds_to_universal`` says of the checkpoint."""
    cells.start()
    os.chdir(folder)
    engine, optimizer = cells.started(cell)
    cells.train(engine, cell, range(SAVED))
    run_block(0, engine=engine, optimizer=optimizer)
    cells.train(engine, cell, range(SAVED, END))
    weights = cells.weights_of_engine(engine, cell)
    return weights, universal() if dist.get_rank() == 0 else None


def universal():
    """The error of ``ds_to_universal``, and what stands in the file for who looks why."""
    (tag,) = [path for path in Path("checkpoint").iterdir() if path.is_dir()]
    keys = {"num_extract_workers": 1, "num_merge_workers": 1, "inject_missing_state": True, "strict": True}
    arguments = SimpleNamespace(input_folder=str(tag), output_folder="universal", keep_temp_folder=False, **keys)
    try:
        ds_to_universal.main(arguments)
        error = ""
    except Exception as refusal:
        error = repr(refusal)
    (file,) = tag.glob("*zero_pp_rank_0_*optim_states.pt")
    held = torch.load(file, weights_only=False)["optimizer_state_dict"]
    return error, held.get("base_optimizer_state", held.get("optimizer_state_dict"))["about"]


def load(cell, folder):
    """The weights at the end of the run that goes on in another layout."""
    cells.start()
    os.chdir(folder)
    net = cells.build(cell, seed=1)
    optimizer = cells.make_optimizer(net, cell)
    engine = run_block(1, model=net, optimizer=optimizer, config=cells.config_of(cell))["engine"]
    cells.train(engine, cell, range(SAVED, END))
    return cells.weights_of_engine(engine, cell)
