"""``gracile pretrain``: a causal language model from scratch, on the Hugging Face Trainer.

python -m gracile.train.pretrain CONFIG.yaml [--key value ...]
torchrun --nproc-per-node 2 -m gracile.train.pretrain CONFIG.yaml
deepspeed --module gracile.train.pretrain CONFIG.yaml
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, set_seed

from ..models.llama import SIZES
from .build.callbacks import EvaluateAt, LogLines
from .build.layers import merges
from .build.model import architecture, build_model
from .build.optimizer import without_effect
from .config.arguments import Config, ModelArguments
from .config.checks import check_values
from .config.help_text import usage
from .config.parser import load_config
from .data.blocks import Blocks, collate, make_blocks
from .data.corpus import Corpus, open_corpus
from .data.stream import BlockStream
from .data.tokenizer import get_tokenizer
from .data_only import data_only
from .engines import deepspeed
from .engines import layout as layouts
from .engines.main_process import on_main
from .engines.process_exit import leave
from .errors import BadInput
from .run import report
from .run.changes import Change
from .run.preflight import check_buildable
from .run.resume import RUN_FILE, check_same_run, resuming, write_run_file
from .run.session import Start, announce_checkpoint, one_at_a_time, record_start, run_command, see_through
from .run.session import train as _train
from .run.stopping import StopRequests
from .sources import source_of

if TYPE_CHECKING:
    from .run.trainer import PretrainTrainer


def pretrain(config: Config, requests: StopRequests | None = None) -> dict[str, Any]:
    """Run ``config`` to its end and return what ``metrics.json`` holds.

    Args:
        requests: signals that end the run after a step, with a checkpoint.

    Raises:
        BadInput: before anything is written, for input that cannot be used.
        RunStopped: when the loss or the weights turn non-finite.
        Interrupted: when a signal has come.
    """
    check_values(config)
    deepspeed.prepare(config.run)
    with data_only(), one_at_a_time(config.run):
        return _pretrain(config, requests)


def _pretrain(config: Config, requests: StopRequests | None) -> dict[str, Any]:
    run, output_dir = config.run, config.run.folder
    start = Start.of(run)
    checkpoint, layout, resharded = start
    chosen = architecture(config.model)
    check_buildable(config, chosen)
    corpus, tokenizer, blocks = read(config, chosen)
    data = corpus.identity(tokenizer)
    changes: list[Change] = []
    if resuming(run):
        folder = output_dir if checkpoint is None else checkpoint.parent
        # found once: the first process may have written run.yaml anew before another one reads it
        changes = on_main(run, lambda: check_same_run(config, folder, data, checkpoint))

    set_seed(run.seed)
    model = build_model(config, checkpoint if resharded else None)
    trainer = trainer_of(config, model, tokenizer, blocks, layout, weights_are_loaded=resharded)
    trainer.changed_keys = {change.key for change in changes}
    if run.should_save:
        write_run_file(config, data)
        _announce(config, model, corpus, blocks)
        if checkpoint is not None:
            announce_checkpoint(config, start, trainer.changed_keys)
        record_start(output_dir, start, data.now, changes)
    if isinstance(blocks.train, BlockStream):
        blocks.train.begin(data.now, trainer.get_total_train_batch_size(run), checkpoint)
    return see_through(
        trainer,
        requests,
        lambda: _train(trainer, checkpoint),
        lambda speed: _finish(config, trainer, output_dir, speed),
    )


def read(config: Config, chosen: PreTrainedConfig) -> tuple[Corpus, PreTrainedTokenizerBase, Blocks]:
    """The data of a run, its tokenizer and its blocks."""
    trusted = config.model.trust_remote_code
    name = config.data.tokenizer or _saved_tokenizer(config.model)
    if name is not None:
        source_of("tokenizer", name)  # before the data, which may take long
    with config.run.main_process_first(desc="reading the data"):
        corpus = open_corpus(config.data, trusted)
        if corpus.streamed and config.run.max_steps <= 0:
            raise BadInput(f"max_steps must be given, for dataset {corpus.name!r} is a stream and has no length")
        tokenizer = get_tokenizer(name, corpus, chosen.vocab_size, trusted)
        return corpus, tokenizer, make_blocks(corpus, tokenizer, config.data)


def _finish(config: Config, trainer: PretrainTrainer, output_dir: Path, speed: float | None) -> dict[str, Any]:
    """The last evaluation, the saved model, metrics.json, loss.png and the table."""
    loss = trainer.validation_loss()
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
        **report.memory(model, trainer.optimizer, trainer.layout, trainer.released),
        "history": report.history_of(trainer.state),
    }
    if config.run.should_save:
        title = f"{config.model.model} LLaMA, {', '.join(config.data.dataset)}, {config.optimizer.optimizer}"
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
    trainer = (kind or PretrainTrainer)(
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
    if config.run.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(LogLines())
    return trainer


def _announce(config: Config, model: nn.Module, corpus: Corpus, blocks: Blocks) -> None:
    parameters = report.elements(model)
    train = "streamed" if isinstance(blocks.train, BlockStream) else f"{len(blocks.train):,}"
    print(
        f"{config.name}: {config.model.model} LLaMA of {parameters:,} parameters"
        f"{f' in {config.model.layer} layers' if config.model.layer else ''}, {config.optimizer.optimizer}, "
        f"{corpus.name}\n"
        f"{train} training and {len(blocks.validation):,} validation blocks of {config.data.block_size} tokens",
        flush=True,
    )
    for note in corpus.notes:
        print(note)
    if config.left_out:
        print(f"{config.optimizer.optimizer} has its own {', '.join(config.left_out)}, not those of the recipe")
    idle = without_effect(config)
    if idle:
        print(f"no effect with {config.optimizer.optimizer}: {', '.join(idle)}")


# ---- the command -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 for bad input; 1 for a run that had to stop; 130 after Ctrl-C and 143 after SIGTERM. All but the
    first say why in one line."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if any(a in ("-h", "--help", "--help-all") for a in arguments):
        print(usage(everything="--help-all" in arguments))
        return 0
    return run_command("pretrain", lambda: load_config(arguments), pretrain)


if __name__ == "__main__":
    leave(main())
