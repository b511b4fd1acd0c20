"""``gracile finetune``: a saved model on instructions, texts or classes, on the Hugging Face Trainer.

python -m gracile.train.finetune CONFIG.yaml [--key value ...]
torchrun --nproc-per-node 2 -m gracile.train.finetune CONFIG.yaml
deepspeed --module gracile.train.finetune CONFIG.yaml

Its nouns, each in a file of its own:

    Format          what a row is: messages, prompt, text or label     data.formats, through data.chat
    Example         its tokens, and the labels of those that carry loss
    ExampleBlocks   examples fitted into blocks, padded or packed       data.examples
    TuningData      what is trained on, validated on and forgotten      data.tuning
    what is trained an adapter of peft's on a frozen model, or all      build.adapter, build.tuned_model

The rest is pretraining's: the parser over other dataclasses (``Settings``), the optimizers, ``RunTrainer`` with its
sealed checkpoints, run.yaml and what may change when a run goes on (``run.changes``), one launch a folder and one line
for what fails (``run.session``). What a row becomes is cached by content; what is too long is decided after it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, set_seed

from .build.adapter import check_adapter, layers_of, method_of, step_callbacks, takes_targets
from .build.callbacks import EvaluateAt, LogLines
from .build.optimizer import unused_keys
from .build.packing_check import check_packing
from .build.selected import build_selected, check_selection, freeze_others, selected_numbers
from .build.tuned_model import (
    base_architecture,
    build_tuned,
    check_widths,
    known_classes,
    prepare_tokens,
    untrained_base,
)
from .config.checks import check_sizes
from .config.finetune_arguments import LABEL, MESSAGES, PROMPT, FinetuneConfig
from .config.finetune_checks import check_finetune
from .config.help_text import usage
from .config.parser import load_settings
from .data.chat import Chat, set_template
from .data.examples import Collator
from .data.tuning import TuningData, open_tuning_data
from .data_only import data_only
from .engines import deepspeed
from .engines.main_process import on_main
from .engines.process_exit import leave
from .errors import BadInput
from .run import report
from .run.changes import Change
from .run.preflight import check_schedule, checked_optimizer
from .run.resume import RUN_FILE, check_same_run, resuming, write_run_file
from .run.session import Start, announce_checkpoint, one_at_a_time, record_start, run_command, see_through, train
from .run.stopping import StopRequests
from .sources import tokenizer_of

if TYPE_CHECKING:
    from .run.finetune_trainer import FinetuneTrainer


def finetune(config: FinetuneConfig, requests: StopRequests | None = None) -> dict[str, Any]:
    """Run ``config`` to its end and return what ``metrics.json`` holds.

    Args:
        requests: signals that end the run after a step, with a checkpoint.

    Raises:
        BadInput: before anything is written, for input that cannot be used.
        RunStopped: when the loss or the weights turn non-finite.
        Interrupted: when a signal has come.
    """
    check_finetune(config)
    check_adapter(config)
    check_selection(config)
    deepspeed.prepare(config.run)
    with data_only(), one_at_a_time(config.run):
        return _finetune(config, requests)


def _finetune(config: FinetuneConfig, requests: StopRequests | None) -> dict[str, Any]:
    run, output_dir = config.run, config.run.folder
    start = Start.of(run)
    checkpoint = start.checkpoint
    architecture = base_architecture(config)
    check_sizes(config, architecture)
    tokenizer, data = read(config, architecture)
    parameters = check_tunable(config, architecture, data)
    changes: list[Change] = []
    if resuming(run):
        folder = output_dir if checkpoint is None else checkpoint.parent
        # found once: the first process may have written run.yaml anew before another one reads it
        changes = on_main(run, lambda: check_same_run(config, folder, data.identity, checkpoint))

    trainer = trainer_of(config, tokenizer, data, start)
    selected = selected_numbers(trainer.model, config)
    trained = report.trainable(trainer.model) if selected is None else selected
    trainer.changed_keys = {change.key for change in changes}
    if run.should_save:
        write_run_file(config, data.identity)
        _announce(config, data, parameters, trained)
        if checkpoint is not None:
            announce_checkpoint(config, start, trainer.changed_keys)
        record_start(output_dir, start, data.identity.now, changes)
    finish = partial(_finish, trainer, parameters, trained)
    return see_through(trainer, requests, lambda: train(trainer, checkpoint), finish)


def _finish(trainer: FinetuneTrainer, parameters: int, trained: int, speed: float | None) -> dict[str, Any]:
    """The last evaluations, the saved model, metrics.json, loss.png and the table."""
    config, folder, data = trainer.config, trainer.config.run.folder, trainer.data
    loss, told = trainer.validation_loss(), trainer.results()
    trainer.export(str(folder))
    model = trainer.accelerator.unwrap_model(trainer.model)
    blocks, steps = trainer.get_total_train_batch_size(config.run), trainer.state.global_step
    tokens = blocks * data.train.tokens / len(data.train)  # of a step, on average
    metrics: dict[str, Any] = {
        "name": config.name,
        "model": config.model.model,
        "adapter": config.model.adapter or config.model.adapter_from,
        "selection": config.model.selection,
        "optimizer": config.optimizer.optimizer,
        "parameters": parameters,
        "trainable_parameters": trained,
        "steps": steps,
        "examples": steps * blocks * data.train.pieces // len(data.train),
        "tokens_per_second": None if speed is None else speed * tokens,
        "validation_loss": loss,
        "validation_perplexity": report.perplexity(loss),
        **told,
        **report.memory(model, trainer.optimizer, trainer.layout, trainer.released),
        "history": report.history_of(trainer.state),
    }
    if config.run.should_save:
        what = metrics["adapter"] or metrics["selection"] or "all weights"
        title = f"{Path(config.model.model).name}, {what}, {metrics['optimizer']}"
        report.plot_losses(folder, metrics["history"], round(tokens), title)
        report.write_metrics(folder, metrics)
        print(f"\n{report.tuning_table(metrics)}\n\n  {folder}/ holds {_what_is_saved(trainer)}, checkpoints,")
        print(f"  {RUN_FILE}, metrics.json, loss.png and TensorBoard logs (tensorboard --logdir {folder})")
    return metrics


def _what_is_saved(trainer: FinetuneTrainer) -> str:
    if not trainer.config.has_adapter:
        return "the model, its tokenizer"
    if trainer.unmerged is None:
        return "the model with the adapter merged, its tokenizer, the adapter alone in adapter/"
    return f"the tokenizer, the adapter in adapter/ ({trainer.unmerged})"


# ---- building --------------------------------------------------------------------------------------------------------


def read(config: FinetuneConfig, architecture: PreTrainedConfig) -> tuple[PreTrainedTokenizerBase, TuningData]:
    """The tokenizer of a run, and its data."""
    tokenizer = read_tokenizer(config, architecture)
    with config.run.main_process_first(desc="reading the data"):
        trusted = config.model.trust_remote_code
        return tokenizer, open_tuning_data(config.data, tokenizer, trusted, known_classes(architecture))


def read_tokenizer(config: FinetuneConfig, architecture: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer, with a chat template and a token that pads. The model is not resized.

    Raises:
        BadInput: for one that cannot be loaded, has more entries than the model, or neither pads nor ends.
    """
    named = config.data.tokenizer or config.model.model
    tokenizer: PreTrainedTokenizerBase = tokenizer_of("tokenizer", named, config.model.trust_remote_code)
    entries, rows = len(tokenizer), architecture.get_text_config().vocab_size
    if entries > rows:
        raise BadInput(
            f"tokenizer {named!r} has {entries} entries, and the model embeds {rows}; choose the model's own"
        )
    set_template(tokenizer, config.data.chat_template)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise BadInput(f"tokenizer {named!r} has neither a token that pads nor one that ends; choose another")
        tokenizer.pad_token = tokenizer.eos_token  # padding carries no loss, whichever token it is
    tokenizer.padding_side = "right"
    return tokenizer


def check_tunable(config: FinetuneConfig, architecture: PreTrainedConfig, data: TuningData) -> int:
    """Build the model and its optimizer once on the meta device; returns the number of the model's parameters.

    Raises:
        BadInput: for what either refuses, or a pattern that matches no layer.
    """
    model = untrained_base(config, architecture, data.classes)
    if config.model.quantize is not None and config.run.use_cpu:
        check_widths(model)
    if not config.has_adapter:
        freeze_others(model, config)
        check_schedule(
            config.run, build_selected(model, config) if config.model.selection else checked_optimizer(model, config)
        )
    elif config.model.adapter is not None and takes_targets(method_of(config.model.adapter)):
        try:
            layers_of(model, config.optimizer.target_modules)
        except ValueError as error:
            raise BadInput(str(error)) from None
    return report.elements(model)


def trainer_of(
    config: FinetuneConfig,
    tokenizer: PreTrainedTokenizerBase,
    data: TuningData,
    start: Start,
    kind: type[FinetuneTrainer] | None = None,
) -> FinetuneTrainer:
    """The trainer of a run, of class ``kind`` where it is given, with the model that it trains.

    Raises:
        BadInput: for what the adapter or the optimizer refuses, or a model in which packed examples meet.
    """
    set_seed(config.run.seed)
    collate = Collator(int(tokenizer.pad_token_id))
    model = build_tuned(config, data, collate, start.checkpoint if start.resharded else None)
    prepare_tokens(model, tokenizer)
    trainer = _trainer_on(model, config, tokenizer, data, start, kind)
    if config.has_adapter:
        check_schedule(config.run, checked_optimizer(model, config))
    if data.train.packed and not trainer.splits_base:
        check_packing(model, model.config.get_text_config().vocab_size, model.device)
    return trainer


def _trainer_on(
    model: PreTrainedModel,
    config: FinetuneConfig,
    tokenizer: PreTrainedTokenizerBase,
    data: TuningData,
    start: Start,
    kind: type[FinetuneTrainer] | None,
) -> FinetuneTrainer:
    from .run.finetune_trainer import FinetuneTrainer  # takes seconds, which help and complaints need not wait for

    chats = {part.format for part in data.parts} & {MESSAGES, PROMPT} and tokenizer.chat_template
    trainer = (kind or FinetuneTrainer)(
        config=config,
        data=data,
        end_tokens=Chat(tokenizer, "the run").ends() if chats else [],
        layout=start.layout,
        weights_are_loaded=start.resharded,
        model=model,
        args=config.run,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=Collator(int(tokenizer.pad_token_id)),
        processing_class=tokenizer,
        callbacks=[EvaluateAt(config.run.evaluate_at), *step_callbacks(model)],
    )
    if config.run.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(LogLines())
    return trainer


def _announce(config: FinetuneConfig, data: TuningData, parameters: int, trained: int) -> None:
    chosen, optimizer = config.model, config.optimizer.optimizer
    what = (
        chosen.adapter
        or chosen.selection
        or (f"the adapter of {chosen.adapter_from}" if chosen.adapter_from else "all weights")
    )
    formats = ", ".join(dict.fromkeys(part.format for part in data.parts))
    packed = f"{data.train.pieces:,} examples in " if data.train.packed else ""
    print(
        f"{config.name}: {chosen.model}, {parameters:,} parameters; {what}, {trained:,} trained, with "
        f"{optimizer}\n{', '.join(config.data.dataset)} ({formats}): {packed}{len(data.train):,} blocks of at most "
        f"{config.data.block_size} tokens to train and {len(data.validation):,} to validate on",
        flush=True,
    )
    for note in data.notes:
        print(note)
    if data.classes and config.data.format == LABEL:
        print(f"classes: {', '.join(data.classes)}")
    if "optimizer" in config.left_out:
        print(f"{optimizer} trains it, without {', '.join(config.left_out)} of the recipe")
    elif config.left_out:
        print(f"{optimizer} has its own {', '.join(config.left_out)}, not those of the recipe")
    idle = unused_keys(config, ("target_modules",) if config.has_adapter else ())
    if idle:
        print(f"no effect with {optimizer}: {', '.join(idle)}")


# ---- the command -----------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes as those of ``gracile pretrain``."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if any(a in ("-h", "--help", "--help-all") for a in arguments):
        print(usage(FinetuneConfig, everything="--help-all" in arguments))
        return 0
    return run_command("finetune", lambda: load_settings(FinetuneConfig, arguments), finetune)


if __name__ == "__main__":
    leave(main())
