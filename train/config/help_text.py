"""The help texts of the commands that train: our keys in full, the Trainer's by name."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from transformers import TrainingArguments

from ...registry import LAYERS, OPTIMIZERS
from ..listing import methods, row
from .arguments import AnySettings, Config, RunArguments
from .finetune_arguments import FinetuneConfig
from .parser import NOT_READ

HEAD = """\
usage: gracile pretrain [CONFIG.yaml | NAME] [--key value ...]

Pretrain a LLaMA from scratch. CONFIG is a YAML file of the keys below, or the name of an embedded one
(quickstart, llama_60m_galore, llama_60m_adamw, ... 130m, 350m, 1b, 7b); without it, quickstart runs.
`gracile list` has all of them.
Command-line values override the file's, which may stand anywhere among them. Paths in a file are looked for
beside the file, then in the working directory. Single keys of a mapping can be given, too:
--optimizer_args.block_size 16 is the optimizer's block size, and --block_size 256 a run's.

  gracile pretrain                                             2M parameters on this Python's standard library
  gracile pretrain quickstart --optimizer adamw --learning_rate 0.003 --output_dir runs/adamw
  gracile pretrain my.yaml --resume_from_checkpoint true       continue from the newest whole checkpoint
  torchrun --nproc-per-node 2 -m gracile.train.pretrain my.yaml
"""

FINETUNE_HEAD = """\
usage: gracile finetune CONFIG.yaml [--key value ...]

Train a saved model on: an adapter of peft's or of gracile.adapters with the model frozen, or every weight with any
optimizer. Rows are messages, a prompt and its response, texts, or texts with a label; only what the model is to say
carries loss. CONFIG is a YAML file of the keys below, or the name of an embedded one.
Command-line values override the file's, which may stand anywhere among them. Paths in a file are looked for
beside the file, then in the working directory. Single keys of a mapping can be given, too: --adapter_args.r 16

  gracile finetune my.yaml --adapter lora --adapter_args.r 16
  gracile finetune my.yaml --optimizer galore_adamw --rank 64 --learning_rate 1e-4 --output_dir runs/full
  gracile finetune my.yaml --resume_from_checkpoint true       continue from the newest whole checkpoint
  torchrun --nproc-per-node 2 -m gracile.train.finetune my.yaml
"""

# The keys of TrainingArguments that nearly every run sets, with help of our own.
COMMON = {
    "output_dir": "Folder of the run: model, checkpoints, logs, report.",
    "max_steps": "Optimizer steps; -1 for num_train_epochs in their place.",
    "per_device_train_batch_size": "Examples per process and forward pass.",
    "gradient_accumulation_steps": "Forward passes per step.",
    "learning_rate": "Peak learning rate.",
    "lr_scheduler_type": "cosine_with_min_lr, linear, constant, ...; its options in lr_scheduler_kwargs.",
    "warmup_steps": "Steps of linear warm-up; below 1, a share of all steps.",
    "weight_decay": "Decoupled decay of weights, not of norms and biases.",
    "max_grad_norm": "Gradients are clipped to this norm; 0 for never.",
    "bf16": "Mixed precision with bfloat16; the weights stay as dtype says.",
    "eval_steps": "Steps between evaluations, with eval_strategy: steps.",
    "save_steps": "Steps between checkpoints; save_total_limit keeps the newest few.",
    "resume_from_checkpoint": "true, for the newest whole checkpoint in output_dir; auto, which begins where there is "
    "no run yet; or a checkpoint's folder.",
    "seed": "What the first weights and the order of the data are drawn from.",
    "deepspeed": "A DeepSpeed configuration file.",
}
# Further keys of TrainingArguments whose own help does not say what they do here.
HERE = {
    "adam_beta1": "The optimizer's first beta; by default the one of its constructor.",
    "adam_beta2": "The optimizer's second beta; by default the one of its constructor.",
    "adam_epsilon": "The optimizer's eps; by default the one of its constructor.",
    "disable_tqdm": "Lines in place of progress bars; by default where there is no terminal.",
    "do_eval": "Of scripts: a run measures its validation loss at the end whatever this says.",
    "do_predict": "Of scripts: a run predicts nothing.",
    "do_train": "Of scripts: a run trains whatever this says.",
    "eval_strategy": "When the validation loss is measured before the end: no, steps or epoch.",
    "logging_strategy": "When losses are logged: steps, epoch or no.",
    "num_train_epochs": "Passes over the data, where max_steps is -1.",
    "save_strategy": "When checkpoints are written: steps, epoch or no.",
}
NO_DEFAULT = ("adam_beta1", "adam_beta2", "adam_epsilon")  # they are the optimizer's, not those of the Trainer


HEADS: dict[str, str] = {Config.command: HEAD, FinetuneConfig.command: FINETUNE_HEAD}


def usage(kind: type[AnySettings] = Config, everything: bool = False) -> str:
    """The help text of a command; with ``everything``, also every other key of TrainingArguments with its default."""
    parts = [HEADS[kind.command]]
    for title, group in zip(("model", "data", "optimizer"), kind.groups, strict=False):
        parts += [f"{title}:", *(_line(f, str(f.metadata["help"])) for f in dataclasses.fields(group)), ""]
    fields = {f.name: f for f in dataclasses.fields(RunArguments) if f.init}
    ours = fields["evaluate_at"]
    parts += ["training:", *(_line(fields[name], text) for name, text in COMMON.items())]
    parts += [_line(ours, str(ours.metadata["help"])), ""]
    rest = sorted(f.name for f in dataclasses.fields(TrainingArguments) if f.init and f.name not in COMMON)
    if everything:
        parts += ["every other key of transformers.TrainingArguments, with its default:"]
        told = {name: HERE.get(name) or _first_sentence(fields[name]) for name in rest if name not in NOT_READ}
        parts += [_line(fields[name], text) for name, text in told.items()]
    else:
        where = f"gracile {kind.command} --help-all"
        parts += [f"and the other {len(rest)} keys of transformers.TrainingArguments: {where}"]
    parts += ["", "optimizers:", *methods(OPTIMIZERS.values())]
    parts += ["", "layers:", *methods(LAYERS.values())] if kind is Config else []
    return "\n".join(parts)


def _first_sentence(field: dataclasses.Field[Any]) -> str:
    text = " ".join(str(field.metadata.get("help") or "Of the Trainer.").split())
    return re.split(r"(?<=[a-z)`'\"])\. ", text)[0].rstrip(".") + "."


def _line(field: dataclasses.Field[Any], text: str) -> str:
    default = "" if field.name in NO_DEFAULT else _default(field)
    return row(f"--{field.name}", f"{text} [{default}]" if default else text)


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if value is dataclasses.MISSING:
        value = field.default_factory() if field.default_factory is not dataclasses.MISSING else None
    if value is None:
        return ""
    if isinstance(value, list):
        return " ".join(str(item) for item in value)
    return str(getattr(value, "value", value))
