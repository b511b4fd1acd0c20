"""``gracile profile``: the memory and the time of a run's first steps, measured, beside what was planned."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from ..optim.distributed import UnsupportedLayout
from . import finetune, pretrain
from .atomic_write import valid_json
from .build.model import architecture, build_model, checkpoints_activations
from .build.tuned_model import base_architecture
from .config.arguments import AnySettings, Config
from .config.finetune_arguments import FinetuneConfig
from .config.output_files import check_output
from .config.parser import OneLineParser
from .config.which import load_either
from .data_only import data_only
from .engines import deepspeed
from .engines.layout import Layout
from .engines.process_exit import leave
from .errors import BadInput, RunStopped
from .measurement import measure
from .measurement.fake_pass import Pass
from .measurement.kinds import ACTIVATIONS, BUFFERS, GRADIENTS, KINDS, STEP, TEMPORARY
from .measurement.phase_timer import BACKWARD, DATA, FORWARD, PHASES, REFRESH, PhaseTimer
from .measurement.planner import Planner
from .run.finetune_trainer import FinetuneTrainer
from .run.preflight import check_buildable
from .run.report import size
from .run.session import Start
from .run.trainer import PretrainTrainer, RunTrainer

HEAD = """\
Train some steps of a run and measure what each process holds and where the time goes, beside what gracile memory plans.
CONFIG is as for gracile pretrain or gracile finetune, and so are all further --key value pairs: a key that only one of
the two has says which it is. Nothing is saved.

  gracile profile quickstart --steps 5
  gracile profile finetune_quickstart --steps 5 --adapter lora --optimizer adamw
  gracile profile my.yaml --steps 5 --trace trace.json --snapshot memory.pickle
  deepspeed --num_accelerators 2 --module gracile.train.profile my.yaml --deepspeed zero2.json
"""


def _flags() -> OneLineParser:
    parser = OneLineParser.of("profile", HEAD)
    parser.add_argument("--command", metavar="WORD", help="pretrain or finetune, where no key of CONFIG says it")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="steps that are timed, after a first one [5]")
    parser.add_argument("--trace", metavar="FILE.json", help="a trace of one step for chrome://tracing and Perfetto")
    parser.add_argument("--snapshot", metavar="FILE.pickle", help="a GPU's memory, for pytorch.org/memory_viz")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


class Profiled(RunTrainer):
    """Times every step, and watches the memory of the last."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.timer = PhaseTimer()
        self.watched: Watched | None = None
        self.accelerator.backward = self.timer.timed(BACKWARD, self.accelerator.backward)
        self.add_callback(_Steps(self))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if new:
            self.timer.listen_to(optimizer)
        return optimizer

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.watched is not None:
            self.watched.batch = tuple(inputs["input_ids"].shape)
        with torch.profiler.record_function(measure.FORWARD), self.timer.phase(FORWARD):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.watched is not None:
            self.watched.weights = measure.addresses(self.model.parameters())
        return loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        with self.timer.phase(DATA):
            return super().get_batch_samples(*args, **kwargs)


class ProfiledPretraining(Profiled, PretrainTrainer):
    """That of ``gracile pretrain``."""


class ProfiledTuning(Profiled, FinetuneTrainer):
    """That of ``gracile finetune``, which evaluates nothing here."""

    def evaluate_before(self) -> None:
        pass


class Watched:
    """The memory of one step, from its beginning to its end; ``batch`` is the shape of what its last pass was given."""

    def __init__(self, trainer: Profiled) -> None:
        self._trainer, self._device = trainer, trainer.args.device
        self._gradients = measure.Gradients(trainer.model)
        self._freed: measure.FreedGradients | None = None
        if trainer.released is not None:
            self._freed = measure.FreedGradients(trainer.model, trainer.released.optimizer)
        self.weights: set[int] = set()
        self.batch = (0, 0)
        self.held: dict[str, int] = {}
        self.gradients = 0  # when a step begins
        self._optimizer = trainer.optimizer
        self._unhook = measure.around_steps(self._optimizer, before=self._hold)
        cuda = [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
        self.profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU, *cuda], profile_memory=True)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.profiler.start()

    def _hold(self) -> None:
        self.held = measure.held(self._trainer.model, self._optimizer)

    def close(self) -> Pass:
        """Stop watching; returns what the pass allocated beside what is held."""
        self.profiler.stop()
        self._gradients.close()
        self._unhook()
        self.gradients = self.held[GRADIENTS]
        if self._trainer.layout.stage >= 2:  # their gradients are views into buckets
            return measure.passed(self.profiler, self._device, set(), self.weights)
        self.held[GRADIENTS] = max(self.held[GRADIENTS], self._gradients.bytes)  # which ZeRO 1 frees before the step
        if self._freed is None:
            self.gradients = self.held[GRADIENTS]
        else:
            self._freed.close()
            self.held[GRADIENTS] = max(self.held[GRADIENTS], self._freed.bytes)
        return measure.passed(self.profiler, self._device, self._gradients.addresses, self.weights, self.used)

    @property
    def used(self) -> Sequence[AbstractSet[int]]:
        """The addresses of gradients at each time that one was used which is freed in the pass."""
        return () if self._freed is None else self._freed.used


class _Steps(TrainerCallback):
    def __init__(self, trainer: Profiled) -> None:
        self.trainer = trainer

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == args.max_steps - 1:
            self.trainer.watched = Watched(self.trainer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer.watched is None:
            self.trainer.timer.step_has_ended()


def profile(
    arguments: Sequence[str], steps: int, output_dir: str, command: str | None = None
) -> tuple[Profiled, Planner]:
    """Train ``steps`` steps after a first one, and one more whose memory is watched.

    Raises:
        BadInput: for input that no run could start with.
    """
    if steps < 1:
        raise BadInput(f"steps must be at least 1, got {steps}")
    silent = {"save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no", "report_to": "none"}
    fixed = {**silent, "max_steps": steps + 2, "output_dir": output_dir, "disable_tqdm": "true"}
    config = load_either([*arguments, *(f"--{key}={value}" for key, value in fixed.items())], command)
    _leave_out_evaluations(config)
    planner = Planner(config, on_cpu=config.run.device.type == "cpu")
    deepspeed.prepare(config.run)
    trainer = _trainer_of(config)
    trainer.train()
    return trainer, planner


def _trainer_of(config: AnySettings) -> Profiled:
    if isinstance(config, Config):
        return _pretraining(config)
    assert isinstance(config, FinetuneConfig)
    return _tuning(config)


def _pretraining(config: Config) -> Profiled:
    chosen = architecture(config.model)
    check_buildable(config, chosen)
    _, tokenizer, blocks = pretrain.read(config, chosen)
    set_seed(config.run.seed)
    model, layout = build_model(config, None), Layout.of(config.run)
    trainer = pretrain.trainer_of(config, model, tokenizer, blocks, layout, kind=ProfiledPretraining)
    assert isinstance(trainer, Profiled)
    return trainer


def _tuning(config: FinetuneConfig) -> Profiled:
    chosen = base_architecture(config)
    tokenizer, data = finetune.read(config, chosen)
    finetune.check_tunable(config, chosen, data)
    start = Start(None, Layout.of(config.run), resharded=False)
    trainer = finetune.trainer_of(config, tokenizer, data, start, kind=ProfiledTuning)
    assert isinstance(trainer, Profiled)
    return trainer


def _leave_out_evaluations(config: AnySettings) -> None:
    run = config.run
    if run.resume_from_checkpoint is not None:
        raise BadInput("resume_from_checkpoint cannot be profiled: steps are the first of a run; leave it out")
    run.evaluate_at, run.eval_on_start = [], False


def compared(trainer: Profiled, planner: Planner) -> dict[str, Any]:
    """Bytes that were planned and measured, and seconds of each phase of a step."""
    run, watched = planner.config.run, trainer.watched
    assert watched is not None
    moment = watched.close()
    optimizer = planner.config.optimizer.optimizer
    examples, tokens = watched.batch
    plan = planner.plan(optimizer, examples, checkpoints_activations(run), tokens)
    found = watched.held | {ACTIVATIONS: moment.activations, TEMPORARY: moment.at_peak.temporary}
    found[STEP] = measure.stepped(watched.profiler, run.device, watched.used)
    planned = {kind: plan.held[kind] + plan.offloaded[kind] for kind in KINDS}
    for bytes_of in (planned, found):  # DeepSpeed's are temporary; DistributedDataParallel's cannot be seen
        buffers = bytes_of.pop(BUFFERS, 0)
        bytes_of[TEMPORARY] += buffers if planner.division.stage else 0
    of_pass = asdict(moment.at_peak)
    in_the_pass = {STEP: of_pass.pop("step"), **of_pass}
    if planner.division.stage >= 2 or run.gradient_accumulation_steps > 1:
        in_the_pass[GRADIENTS] += watched.gradients  # which exist before the last pass
    in_the_step = {ACTIVATIONS: 0, GRADIENTS: watched.gradients, TEMPORARY: 0, STEP: found[STEP]}
    return {
        "model": planner.config.model.model,
        "optimizer": optimizer,
        "part": planner.trainee.part,
        "batch": list(watched.batch),
        "division": str(planner.division),
        "planned": planned,
        "measured": {kind: found.get(kind, 0) for kind in planned},
        "at_peak": {"planned": plan.at_peak, "measured": max(in_the_pass, in_the_step, key=_total)},
        "peak_memory": measure.peak_memory(),
        "seconds": trainer.timer.medians(),
    }


def _total(held: dict[str, int]) -> int:
    return sum(held.values())


def table(result: dict[str, Any], steps: int) -> str:
    """The result of ``compared`` as text."""
    rows = [("each process", "planned", "measured", "")]
    for kind, planned in result["planned"].items():
        measured = result["measured"][kind]
        if planned or measured:
            share = f"{measured / planned:.1%}" if planned else ""
            rows.append(
                (
                    f"{kind}, buffers" if kind == TEMPORARY and "ZeRO" in result["division"] else kind,
                    size(planned),
                    size(measured),
                    share,
                )
            )
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}" for a, b, c, d in rows]
    where = "allocated on the GPU" if torch.cuda.is_available() else "resident, Python and its libraries included"
    lines += ["", f"  {size(result['peak_memory'])} at most {where}", ""]
    seconds = result["seconds"]
    ordinary = sum(value for phase, value in seconds.items() if phase != REFRESH)
    lines += [f"  a step, median of {steps}: {1000 * ordinary:,.1f} ms, refreshes apart"]
    for phase in PHASES:
        if phase != REFRESH:
            lines.append(f"    {phase:<10}{1000 * seconds[phase]:>9,.1f} ms  {seconds[phase] / ordinary:>6.1%}")
    if seconds[REFRESH]:
        lines.append(f"    {REFRESH:<10}{1000 * seconds[REFRESH]:>9,.1f} ms  in a step that has one")
    part = "" if result["part"] is None else f", {result['part']}"
    examples, tokens = result["batch"]
    title = f"{result['model']}{part}, {result['optimizer']}; {examples} x {tokens} tokens a pass; {result['division']}"
    return "\n".join([title, "", *lines])


def _check_files(options: argparse.Namespace) -> None:
    if options.trace is not None:
        check_output("trace", options.trace, (".json",))
    if options.snapshot is not None:
        check_output("snapshot", options.snapshot, (".pickle",))
    if options.snapshot is not None and not torch.cuda.is_available():
        raise BadInput("snapshot needs a GPU: it is the history of its allocator; leave it out, or give --trace")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 for bad input; 1 for a run that had to stop. Both say why in one line."""
    arguments = [a for a in (sys.argv[1:] if argv is None else argv) if not a.startswith("--local_rank=")]
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        options, rest = _flags().parse_known_args(arguments)
        _check_files(options)
        if options.snapshot is not None:
            torch.cuda.memory._record_memory_history()
        with data_only(), tempfile.TemporaryDirectory() as folder:
            trainer, planner = profile(rest, options.steps, folder, options.command)
            result = compared(trainer, planner)
    except BadInput as error:
        if is_main:
            print(f"gracile profile: {error}", file=sys.stderr)
        return 2
    except (RunStopped, UnsupportedLayout) as error:
        print(f"gracile profile: {error}", file=sys.stderr)
        return 1
    if is_main:
        assert trainer.watched is not None
        print(valid_json(result, indent=2) if options.json else table(result, options.steps))
        if options.trace is not None:
            trainer.watched.profiler.export_chrome_trace(options.trace)
        if options.snapshot is not None:
            torch.cuda.memory._dump_snapshot(options.snapshot)
    return 0


if __name__ == "__main__":
    leave(main())
