"""What every command that trains does around its training: one launch a folder, a history, one line for what fails."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import transformers

from ...optim.distributed import UnsupportedLayout
from ..config.arguments import AnySettings, RunArguments
from ..engines import layout as layouts
from ..engines.main_process import on_main
from ..errors import BadInput, CannotLoad, RunStopped
from . import faults, history, lock
from .changes import BATCH, Change, size_of_steps, step_of
from .resume import distrust_skipped, starting_point
from .stopping import Interrupted, StopRequests, StopTogether

if TYPE_CHECKING:
    from .trainer import RunTrainer


class Start(NamedTuple):
    """Where a run begins: from a checkpoint or none, in a layout, and whether that is another than the checkpoint's."""

    checkpoint: Path | None
    layout: layouts.Layout
    resharded: bool

    @classmethod
    def of(cls, run: RunArguments) -> Start:
        """As ``run`` says; the same on every process. Collective."""
        checkpoint = on_main(run, lambda: starting_point(run))
        distrust_skipped(run, checkpoint)
        layout = layouts.Layout.of(run)
        return cls(checkpoint, layout, checkpoint is not None and layouts.needs_resharding(checkpoint, layout))


@contextmanager
def one_at_a_time(run: RunArguments) -> Iterator[None]:
    """The run's folder, held by the first process for all of its launch.

    Raises:
        BadInput: on every process, where another launch has it.
    """
    with ExitStack() as stack:
        on_main(run, lambda: stack.enter_context(lock.held(run.folder)))
        yield


def record_start(output_dir: Path, start: Start, data: str, changes: list[Change]) -> None:
    """Tell what has changed, and write history.jsonl."""
    for change in changes:
        print(change, flush=True)
    step = 0 if start.checkpoint is None else step_of(start.checkpoint)
    told = {change.key: [change.before, change.now] for change in changes}
    origin = None if start.checkpoint is None else str(start.checkpoint)
    where = {"from": origin, "layout": str(start.layout), "data": data}
    history.append(output_dir, "started", step, **where, **history.surroundings(), changes=told)


def announce_checkpoint(config: AnySettings, start: Start, changed: set[str]) -> None:
    """Say where the run goes on from, and what that changes."""
    checkpoint, layout = start.checkpoint, start.layout
    assert checkpoint is not None
    before = layouts.saved(checkpoint)
    change = f", made by {before}; its state is split anew for {layout}" if start.resharded else ""
    print(f"continuing from {checkpoint}{change}")
    if start.resharded and config.optimizer.optimizer.endswith("8bit"):
        print("moments in 8 bits are rounded once more, in other blocks: weights come to differ by some 2e-3")
    if before is None or before.examples_per_step == layout.examples_per_step or changed & BATCH:
        return  # or it is told where the key is that has changed
    size = size_of_steps(config.run, checkpoint, before.examples_per_step)
    print(f"{size}; gradient_accumulation_steps or per_device_train_batch_size can make it the same run")


def train(trainer: RunTrainer, checkpoint: Path | None) -> float | None:
    """Train to the end; steps per second, or None where the checkpoint was the end already."""
    if checkpoint is not None and trainer.is_finished(checkpoint):
        trainer.load_finished(checkpoint)
        return None
    output = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    speed: float = output.metrics["train_steps_per_second"]
    return speed


def see_through(
    trainer: RunTrainer,
    requests: StopRequests | None,
    trained: Callable[[], float | None],
    finished: Callable[[float | None], dict[str, Any]],
) -> dict[str, Any]:
    """Train, finish, and write into the history how it ended; returns what ``finished`` does.

    Raises:
        RunStopped: when the loss or the weights turn non-finite.
        Interrupted: when a signal has come.
    """
    run = trainer.args
    stop = None if requests is None else StopTogether(requests)
    if stop is not None:
        trainer.add_callback(stop)
    try:
        speed = trained()
        if stop is not None and stop.stopped_by:
            raise Interrupted(stop.stopped_by, trainer.state.global_step)
        metrics = finished(speed)
    except (Interrupted, RunStopped) as end:
        if run.should_save:
            history.append(run.folder, "stopped", trainer.state.global_step, why=str(end))
        raise
    if run.should_save:
        history.append(run.folder, "finished", trainer.state.global_step)
    return metrics


# ---- the command ----------------------------------------------------------------------------------------------------


def run_command(command: str, load: Callable[[], AnySettings], work: Callable[[Any, StopRequests], object]) -> int:
    """Exit code 0; 2 for bad input; 1 for a run that had to stop; 130 after Ctrl-C and 143 after SIGTERM. All but the
    first say why in one line."""
    config: AnySettings | None = None
    try:
        with StopRequests() as requests:
            config = load()
            if config.run.disable_tqdm:
                _no_bars()
            work(config, requests)
    except BadInput as error:
        if is_first_process() or isinstance(error, CannotLoad):  # every process meets the same input
            print(f"gracile {command}: {error}", file=sys.stderr)
        return 2
    except (RunStopped, UnsupportedLayout) as error:
        print(f"gracile {command}: {error}", file=sys.stderr)
        return 1
    except Interrupted as stop:
        if is_first_process():
            print(f"gracile {command}: {stop}; {_what_stays(config)}", file=sys.stderr)
        return stop.code
    except Exception as error:
        reason = faults.explained(error)
        if reason is None:
            raise
        print(f"gracile {command}: {reason}; {_what_stays(config)}", file=sys.stderr)
        return 1
    return 0


def _no_bars() -> None:
    """Those of the libraries, which the Trainer's key does not reach."""
    import datasets

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _what_stays(config: AnySettings | None) -> str:
    return faults.what_stays(None if config is None else config.run.folder)
