"""``gracile pretrain``: a causal language model from scratch, on the Hugging Face Trainer.

python -m gracile.train.pretrain CONFIG.yaml [--key value ...]
torchrun --nproc-per-node 2 -m gracile.train.pretrain CONFIG.yaml
deepspeed --module gracile.train.pretrain CONFIG.yaml
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from .. import __version__
from ..models.llama import SIZES
from ..optim.distributed import UnsupportedLayout
from .atomic_write import write_atomically
from .build.callbacks import EvaluateAt
from .build.layers import merges
from .build.model import architecture, build_model
from .build.optimizer import without_effect
from .config.arguments import Config, ModelArguments, RunArguments
from .config.checks import check_values
from .config.help_text import usage
from .config.parser import load_config
from .data.blocks import Blocks, Corpus, collate, make_blocks, open_corpus, tokenizer_identity
from .data.tokenizer import get_tokenizer
from .data_only import data_only
from .engines import deepspeed
from .engines import layout as layouts
from .engines.main_process import on_main
from .engines.process_exit import leave
from .errors import BadInput, RunStopped
from .run import lock, report
from .run.preflight import check_buildable
from .run.resume import RUN_FILE, check_same_run, resuming, starting_point
from .sources import source_of

if TYPE_CHECKING:
    from .run.trainer import PretrainTrainer


def pretrain(config: Config) -> dict[str, Any]:
    """Run ``config`` to its end and return what ``metrics.json`` holds.

    Raises:
        BadInput: before anything is written, for input that cannot be used.
        RunStopped: when the loss or the weights turn non-finite.
    """
    check_values(config)
    deepspeed.prepare(config.run)
    with data_only(), one_at_a_time(config.run):
        return _pretrain(config)


def _pretrain(config: Config) -> dict[str, Any]:
    run = config.run
    output_dir = run.folder
    checkpoint = on_main(run, lambda: starting_point(run))
    layout = layouts.Layout.of(run)
    resharded = checkpoint is not None and layouts.needs_resharding(checkpoint, layout)
    chosen = architecture(config.model)
    check_buildable(config, chosen)
    corpus, tokenizer, blocks = read(config, chosen)
    data_identity = f"{corpus.fingerprint}-{tokenizer_identity(tokenizer)}"
    if resuming(run):
        check_same_run(config, output_dir if checkpoint is None else checkpoint.parent, data_identity)

    set_seed(run.seed)
    model = build_model(config, checkpoint if resharded else None)
    trainer = trainer_of(config, model, tokenizer, blocks, layout, weights_are_loaded=resharded)
    if run.should_save:
        text = yaml.safe_dump({"gracile": __version__, "data": data_identity, "config": config.resolved()})
        write_atomically(output_dir / RUN_FILE, text)
        _announce(config, model, corpus, blocks)
        if checkpoint is not None:
            _announce_checkpoint(checkpoint, layout, resharded, config.optimizer.optimizer)

    steps_per_second = _train(trainer, checkpoint)
    return _finish(config, trainer, output_dir, steps_per_second)


def read(config: Config, chosen: PreTrainedConfig) -> tuple[Corpus, PreTrainedTokenizerBase, Blocks]:
    """The data of a run, its tokenizer and its blocks."""
    trusted = config.model.trust_remote_code
    name = config.data.tokenizer or _saved_tokenizer(config.model)
    if name is not None:
        source_of("tokenizer", name)  # before the data, which may take long
    with config.run.main_process_first(desc="reading the data"):
        corpus = open_corpus(config.data, trusted)
        tokenizer = get_tokenizer(name, corpus, chosen.vocab_size, trusted)
        return corpus, tokenizer, make_blocks(corpus, tokenizer, config.data)


@contextmanager
def one_at_a_time(run: RunArguments) -> Iterator[None]:
    """The run's folder, held by the first process for all of its launch.

    Raises:
        BadInput: on every process, where another launch has it.
    """
    with ExitStack() as stack:
        on_main(run, lambda: stack.enter_context(lock.held(run.folder)))
        yield


def _train(trainer: PretrainTrainer, checkpoint: Path | None) -> float | None:
    """Train to the end; steps per second, or None where the checkpoint was the end already."""
    if checkpoint is not None and trainer.is_finished(checkpoint):
        trainer.load_finished(checkpoint)
        return None
    output = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return output.metrics["train_steps_per_second"]


def _finish(config: Config, trainer: PretrainTrainer, output_dir: Path, speed: float | None) -> dict[str, Any]:
    """The last evaluation, the saved model, metrics.json, loss.png and the table."""
    loss = trainer.evaluate()["eval_loss"]
    trainer.export(str(output_dir))
    model = trainer.accelerator.unwrap_model(trainer.model)
    tokens_per_step = trainer.get_total_train_batch_size(config.run) * config.data.block_size
    steps = trainer.state.global_step
    metrics: dict[str, Any] = {
        "name": config.name,
        "model": config.model.model,
        "optimizer": config.optimizer.optimizer,
        "parameters": report.elements(model),
        "steps": steps,
        "tokens": steps * tokens_per_step,
        "tokens_per_second": None if speed is None else speed * tokens_per_step,
        "validation_loss": loss,
        "validation_perplexity": report.perplexity(loss),
        **report.memory(model, trainer.optimizer, trainer.layout),
        "history": report.history_of(trainer.state),
    }
    if config.run.should_save:
        title = f"{config.model.model} LLaMA, {config.data.dataset}, {config.optimizer.optimizer}"
        report.plot_losses(output_dir, metrics["history"], tokens_per_step, title)
        report.write_metrics(output_dir, metrics)
        whole, parts = "the model, its tokenizer, checkpoints,", "a tokenizer, checkpoints, the last of them the model,"
        print(f"\n{report.closing_table(metrics)}\n\n  {output_dir}/ holds {whole if merges(model) else parts}")
        print(f"  {RUN_FILE}, metrics.json, loss.png and TensorBoard logs (tensorboard --logdir {output_dir})")
    return metrics


# ---- building --------------------------------------------------------------------------------------------------------


def _saved_tokenizer(chosen: ModelArguments) -> str | None:
    return None if chosen.model in SIZES else chosen.model


def trainer_of(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: Blocks,
    layout: layouts.Layout,
    *,
    weights_are_loaded: bool = False,
    kind: type[PretrainTrainer] | None = None,
) -> PretrainTrainer:
    """The trainer of a run, of class ``kind`` where it is given."""
    from .run.trainer import PretrainTrainer  # takes seconds, which help and complaints need not wait for

    for settings in (model.config, model.generation_config):
        for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(settings, token, getattr(tokenizer, token))
    return (kind or PretrainTrainer)(
        config=config,
        layout=layout,
        weights_are_loaded=weights_are_loaded,
        model=model,
        args=config.run,
        train_dataset=blocks.train,
        eval_dataset=blocks.validation,
        data_collator=collate,
        processing_class=tokenizer,
        callbacks=[EvaluateAt(config.run.evaluate_at)],
    )


def _announce(config: Config, model: nn.Module, corpus: Corpus, blocks: Blocks) -> None:
    parameters = report.elements(model)
    train = "streamed" if corpus.streamed else f"{len(blocks.train):,}"
    print(
        f"{config.name}: {config.model.model} LLaMA of {parameters:,} parameters"
        f"{f' in {config.model.layer} layers' if config.model.layer else ''}, {config.optimizer.optimizer}, "
        f"{corpus.name}\n"
        f"{train} training and {len(blocks.validation):,} validation blocks of {config.data.block_size} tokens",
        flush=True,
    )
    if config.left_out:
        print(f"{config.optimizer.optimizer} has its own {', '.join(config.left_out)}, not those of the recipe")
    idle = without_effect(config)
    if idle:
        print(f"no effect with {config.optimizer.optimizer}: {', '.join(idle)}")


def _announce_checkpoint(checkpoint: Path, layout: layouts.Layout, resharded: bool, optimizer: str) -> None:
    before = layouts.saved(checkpoint)
    change = f", made by {before}; its state is split anew for {layout}" if resharded else ""
    print(f"continuing from {checkpoint}{change}")
    if resharded and optimizer.endswith("8bit"):
        print("moments in 8 bits are rounded once more, in other blocks: weights come to differ by some 2e-3")
    if before is not None and before.examples_per_step != layout.examples_per_step:
        print(
            f"a step takes {layout.examples_per_step} examples now, {before.examples_per_step} before; "
            "gradient_accumulation_steps or per_device_train_batch_size can make it the same run"
        )


# ---- the command -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 for bad input; 1 for a run that had to stop. Both say why in one line."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if any(a in ("-h", "--help", "--help-all") for a in arguments):
        print(usage(everything="--help-all" in arguments))
        return 0
    try:
        pretrain(load_config(arguments))
    except BadInput as error:
        if os.environ.get("RANK", "0") == "0":  # every process meets the same input
            print(f"gracile pretrain: {error}", file=sys.stderr)
        return 2
    except (RunStopped, UnsupportedLayout) as error:
        print(f"gracile pretrain: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    leave(main())
