"""The transformers Trainer on the text of ``published_scripts.py``, its optimizer built by a given file: transformers'
own ``trainer_optimizer.py``, or LLaMA-Factory's ``trainer_utils.py``.

    python trainer.py --corpus FOLDER --source trainer_optimizer.py --optim galore_adamw
    python trainer.py --corpus FOLDER --source trainer_utils.py --use galore --optim adamw_torch
"""

import argparse
import importlib.util
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, trainer

parser = argparse.ArgumentParser()
parser.add_argument("--corpus", type=Path, required=True)
parser.add_argument("--source", type=Path, required=True)
parser.add_argument("--optim", required=True)
parser.add_argument("--optim_args")
parser.add_argument("--use", choices=("galore", "apollo"), help="of LLaMA-Factory")
parser.add_argument("--layerwise", action="store_true", help="of LLaMA-Factory")
parser.add_argument("--lr", type=float)
parser.add_argument("--rank", type=int)
parser.add_argument("--gap", type=int)
parser.add_argument("--length", type=int)
parser.add_argument("--batch", type=int)
parser.add_argument("--steps", type=int)
parser.add_argument("--device")
options = parser.parse_args()


def load(name):
    """The given file as a module of its package."""
    spec = importlib.util.spec_from_file_location(name, options.source)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of_llama_factory(model, arguments):
    """Its optimizer, with its defaults but for the sizes; of its other modules there is what that asks for."""
    quiet = types.SimpleNamespace(info_rank0=print, warning_rank0=print)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    there = {
        "extras": {"logging": types.SimpleNamespace(get_logger=lambda _: quiet)},
        "extras.constants": {"IGNORE_INDEX": -100, "SWANLAB_CONFIG": ""},
        "extras.misc": {"get_device_name": None},
        "extras.packages": {
            **dict.fromkeys(("is_apollo_available", "is_galore_available"), lambda: True),
            "is_ray_available": lambda: False,
        },
        "hparams": dict.fromkeys(("FinetuningArguments", "ModelArguments")),
        "model": {
            "find_all_linear_modules": lambda *_: [name for name in linear if name != "lm_head"],
            **dict.fromkeys(("load_model", "load_tokenizer", "load_valuehead_params")),
        },
    }
    for name in ("", ".train"):
        sys.modules[f"llamafactory{name}"] = types.ModuleType(f"llamafactory{name}")
        sys.modules[f"llamafactory{name}"].__path__ = []
    for name, held in there.items():
        sys.modules[f"llamafactory.{name}"] = types.ModuleType(name)
        sys.modules[f"llamafactory.{name}"].__dict__.update(held)
    of = {"target": ["all"], "rank": options.rank, "update_interval": options.gap, "proj_type": "std"}
    of |= {"layerwise": options.layerwise}
    galore = {f"galore_{key}": value for key, value in {**of, "scale": 2.0}.items()}
    apollo = {"scale": 32.0, "proj": "random", "scale_type": "channel", "scale_front": False}
    apollo = {f"apollo_{key}": value for key, value in {**of, **apollo}.items()}
    finetuning = types.SimpleNamespace(**galore, **apollo, freeze_vision_tower=True)
    create = getattr(load("llamafactory.train.trainer_utils"), f"_create_{options.use}_optimizer")
    return create(model, arguments, finetuning)


tokens = torch.from_numpy(np.fromfile(options.corpus / "tokens.bin", dtype=np.uint16).astype(np.int64))
blocks = tokens[: len(tokens) // options.length * options.length].view(-1, options.length)
dataset = [{"input_ids": block, "labels": block} for block in blocks]
arguments = TrainingArguments(
    output_dir=str(options.source.parent / "out"),
    max_steps=options.steps,
    per_device_train_batch_size=options.batch,
    learning_rate=options.lr,
    warmup_steps=6,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
    use_cpu=options.device == "cpu",
    optim=options.optim,
    optim_args=options.optim_args,
    optim_target_modules=["attn", "mlp"],
)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(**json.loads((options.corpus / "config.json").read_text())))
built = None
if options.use is None:
    trainer._OPTIMIZER_HANDLERS = load("transformers.trainer_optimizer")._OPTIMIZER_HANDLERS
else:
    built = of_llama_factory(model, arguments)
Trainer(model, arguments, train_dataset=dataset, optimizers=(built, None)).train()
