"""Where a run starts: at step 0 in a folder of its own, or from a checkpoint of the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ... import __version__
from ..atomic_write import write_atomically
from ..config.arguments import AnySettings, RunArguments
from ..data.identity import DATA_FILE, Identity
from ..errors import BadInput
from . import changes, checkpoints

RUN_FILE = "run.yaml"
# Files that a run writes into its output directory, and must not overwrite in another run's.
TRACES = (RUN_FILE, "metrics.json", "config.json", "model.safetensors", "model.safetensors.index.json")


def resuming(run: RunArguments) -> bool:
    return str(run.resume_from_checkpoint).lower() not in ("none", "false", "no", "0")


def starting_point(run: RunArguments) -> Path | None:
    """The checkpoint to continue from, or None to start at step 0.

    Raises:
        BadInput: for an output directory that holds another run, or a checkpoint that is not there or not whole.
    """
    output_dir = run.folder
    wanted = str(run.resume_from_checkpoint)
    if not resuming(run) or (wanted.lower() == "auto" and not _traces(output_dir)):
        _refuse_traces(output_dir)
        return None
    if not _takes_newest(run):
        return _named_checkpoint(Path(wanted))
    newest, skipped = checkpoints.newest_whole(output_dir)
    if run.should_save:
        for checkpoint, reason in skipped.items():
            print(f"skipping {checkpoint}: {reason}")
    if newest is None:
        damaged = next(((c, why) for c, why in skipped.items() if checkpoints.is_sealed(c)), None)
        if damaged is not None:
            raise BadInput(
                f"output_dir {run.output_dir!r} holds no whole checkpoint: {damaged[1]} in {damaged[0].name}; restore "
                "it, or start a new run in another --output_dir"
            )
        begun = (output_dir / RUN_FILE).is_file() and not (output_dir / "metrics.json").is_file()
        if not begun:
            raise BadInput(
                f"resume_from_checkpoint is {wanted!r} but output_dir {run.output_dir!r} holds no whole checkpoint; "
                "leave it out to start a new run"
            )
        if run.should_save:
            print(f"{output_dir} holds a run that was stopped before its first checkpoint: starting it again")
        return None
    return _proven(newest)


def _takes_newest(run: RunArguments) -> bool:
    return str(run.resume_from_checkpoint).lower() in ("auto", "true", "yes", "1")


def distrust_skipped(run: RunArguments, chosen: Path | None) -> None:
    """On every process: newer checkpoints than the one that was chosen were found damaged."""
    if chosen is not None and _takes_newest(run):
        for found in checkpoints.checkpoints(run.folder):
            if checkpoints.number(found) > checkpoints.number(chosen):
                checkpoints.distrust(found)


def _proven(checkpoint: Path) -> Path:
    if not checkpoints.has_checksums(checkpoint):
        print(f"{checkpoint} is of an older gracile and has no checksums: its files were looked at, not compared")
    return checkpoint


def _traces(output_dir: Path) -> list[str]:
    found = [name for name in TRACES if (output_dir / name).exists()]
    return found + [checkpoint.name for checkpoint in checkpoints.checkpoints(output_dir)]


def _refuse_traces(output_dir: Path) -> None:
    found = _traces(output_dir)
    if found:
        raise BadInput(
            f"output_dir {str(output_dir)!r} holds another run ({found[0]}); continue it with "
            "--resume_from_checkpoint true, or choose another --output_dir"
        )


def _named_checkpoint(checkpoint: Path) -> Path:
    if not checkpoint.is_dir():
        raise BadInput(f"resume_from_checkpoint {str(checkpoint)!r} is no checkpoint; give its folder, or true")
    reason = checkpoints.fault(checkpoint)
    if reason is not None:
        raise BadInput(f"resume_from_checkpoint {str(checkpoint)!r} is not whole: {reason}; give another, or true")
    return _proven(checkpoint)


def check_same_run(
    config: AnySettings, output_dir: Path, data: Identity, checkpoint: Path | None = None
) -> list[changes.Change]:
    """The keys that have changed since the run began, and may.

    Raises:
        BadInput: for one that may not, such as another model, other data or another optimizer.
    """
    saved = read_run_file(output_dir)
    if saved is None:
        return []  # a checkpoint that was copied away from its run
    found = changes.between(saved["config"], config, output_dir, checkpoint)
    if data.is_that_of(saved["data"]):
        return found
    differs = f"the data is not that of the run in {str(output_dir)!r}: {data.difference(output_dir, saved['data'])}"
    if not config.data.ignore_data_changes:
        raise BadInput(f"{differs}; restore it, or go on with it by --ignore_data_changes true")
    if config.run.should_save:
        print(f"{differs}; going on, as ignore_data_changes says")
    return found


def write_run_file(config: AnySettings, data: Identity) -> None:
    """run.yaml, a configuration that runs again, and data.json, what it reads."""
    folder = config.run.folder
    text = yaml.safe_dump({"gracile": __version__, "data": data.now, "config": config.resolved()})
    write_atomically(folder / RUN_FILE, text)
    write_atomically(folder / DATA_FILE, data.record())


def read_run_file(output_dir: Path) -> dict[str, Any] | None:
    """What run.yaml says of the run in a folder; None without one.

    Raises:
        BadInput: for one that cannot be read.
    """
    file = output_dir / RUN_FILE
    try:
        saved = yaml.safe_load(file.read_text(encoding="utf-8"))
        if not (isinstance(saved, dict) and isinstance(saved["config"], dict) and isinstance(saved["data"], str)):
            raise KeyError("config or data")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise BadInput(
            f"{str(file)!r} does not say what the run began with ({reason}); restore it, or remove it to go on with "
            "what is given now"
        ) from None
    return saved
