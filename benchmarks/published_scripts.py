"""Published training scripts as they are and with the line changed that makes them use gracile, at equal seeds.

    git clone https://github.com/jiaweizzhao/GaLore
    python benchmarks/published_scripts.py GaLore              # and other checkouts that published_list.py knows
    python benchmarks/published_scripts.py --only Trainer      # what the installed transformers have
    python benchmarks/published_scripts.py GaLore --text wikitext.txt --results /tmp/scripts.json

Each script runs three times on a small LLaMA (or GPT) and real text: as published; with gracile's arithmetic made the
original's (``subspace_method="svd"``); with gracile's defaults. A script runs in a copy of its checkout, with
``stand_ins.py`` for what a machine without a GPU and a network lacks. Of its loss every step is compared. Results of
scripts that were not given are kept.
"""

from __future__ import annotations

import argparse
import difflib
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from published_list import BATCH, BY_CLASS, LENGTH, SCRIPTS, STEPS, VOCABULARY, Edit, Script
from stand_ins import Run, run

RESULTS = Path(__file__).parent / "results" / "published_scripts.json"
PAGE = Path(__file__).parents[1] / "docs" / "migrating.md"
BEGIN, END = "<!-- published scripts: begin -->\n", "<!-- published scripts: end -->\n"
LAST = 10  # steps whose mean loss a table shows
SHOWN = (5, 10, 15, 30, 60)  # steps of the start that the results keep by themselves
PRELOADED = ("bitsandbytes", "datasets", "transformers.trainer", "transformers.models.llama.modeling_llama", "gracile")
CONFIG = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


class Failed(Exception):
    """A script that did not run to its end, and why."""


# ---- text -----------------------------------------------------------------------------------------------------------


def make_corpus(folder: Path, text: str) -> None:
    """What scripts read: passages, a tokenizer, a model's configuration, tokens in a row and in blocks."""
    import datasets

    from gracile.train.config.arguments import DataArguments
    from gracile.train.data.blocks import open_corpus, pack
    from gracile.train.data.tokenizer import get_tokenizer

    corpus = open_corpus(DataArguments(dataset=text))
    tokenizer = get_tokenizer(None, corpus, VOCABULARY)
    if len(tokenizer) != VOCABULARY:
        raise SystemExit(f"{text} gives a vocabulary of {len(tokenizer)}, fewer than {VOCABULARY}; give more text")
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    passages: list[str] = []
    for document in corpus.documents.shuffle(seed=0):
        held = document["text"]
        passages += [held[i : i + 5 * LENGTH] for i in range(0, len(held) - 5 * LENGTH, 5 * LENGTH)]
        if len(passages) >= 4 * STEPS * BATCH:
            break
    (folder / "passages.json").write_text(json.dumps(passages))
    blocks = list(pack(passages, tokenizer, LENGTH))
    np.array([block["input_ids"] for block in blocks], dtype=np.uint16).tofile(folder / "tokens.bin")
    parts = {"train": blocks[:-BATCH], "validation": blocks[-BATCH:]}
    held_as = datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in parts.items()})
    held_as.save_to_disk(folder / "blocks")
    told = {"tokenizer": str(folder / "tokenizer"), "sequence_length": LENGTH}
    (folder / "blocks" / "args.json").write_text(json.dumps(told))


# ---- scripts --------------------------------------------------------------------------------------------------------


def checkouts(folders: list[Path]) -> dict[str, Path]:
    """Folders by the repository that each is a checkout of; the installed transformers are one."""
    import transformers

    found = {}
    for folder in [*folders, Path(transformers.__file__).parent]:
        known = [script.repository for script in SCRIPTS if (folder / script.marker).is_file()]
        if not known:
            raise SystemExit(f"{folder} is a checkout of none of {', '.join(sorted({s.repository for s in SCRIPTS}))}")
        found[known[0]] = folder.resolve()
    return found


def commit_of(folder: Path, repository: str) -> str:
    if repository == "huggingface/transformers":
        return metadata.version("transformers")
    git = ["git", "-C", str(folder)]
    done = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False).stdout
    return (done.stdout.strip()[:10] or "unknown") + (" and changes" if changed.strip() else "")


def copied(script: Script, source: Path, target: Path) -> None:
    """A copy of the checkout that a run may write into, with the driver of Trainer's scripts."""
    for name in script.copied:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, target / name)
    if not script.copied:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(".git"), dirs_exist_ok=True)
    if script.file == "trainer.py":
        shutil.copy(Path(__file__).with_name("published_trainer.py"), target / script.file)


def edited(folder: Path, edits: tuple[Edit, ...]) -> tuple[str, int]:
    """Make the edits; the diff of what they change, and how many lines that is."""
    before = {name: (folder / name).read_text() for name in dict.fromkeys(edit.file for edit in edits)}
    after = dict(before)
    for edit in edits:
        if (count := f"\n{after[edit.file]}".count(f"\n{edit.old}\n")) != 1:
            raise Failed(f"{edit.file} has {count} times the line {edit.old.strip()!r}, not once: another commit?")
        after[edit.file] = f"\n{after[edit.file]}".replace(f"\n{edit.old}\n", f"\n{edit.new}\n")[1:]
    for name, text in after.items():
        (folder / name).write_text(text)
    lines = []
    count = 0
    for name, old in before.items():
        pair = old.splitlines(), after[name].splitlines()
        lines += difflib.unified_diff(*pair, name, name, lineterm="", n=0)
        stretches = difflib.SequenceMatcher(None, *pair, autojunk=False).get_opcodes()
        count += sum(max(i2 - i1, j2 - j1) for kind, i1, i2, j1, j2 in stretches if kind != "equal")
    return "\n".join(line.rstrip() for line in lines if not line.startswith(("@@", "--- "))), count


# ---- runs -----------------------------------------------------------------------------------------------------------


Start = Callable[[Run, Path], Run]  # a run, and the file that it prints into


def trained(
    script: Script, source: Path, edits: tuple[Edit, ...], corpus: Path, device: str, start: Start
) -> dict[str, Any]:
    """One run of a script with such edits."""
    with tempfile.TemporaryDirectory() as held:
        folder = Path(held).resolve()
        copied(script, source, folder)
        diff, lines = edited(folder, edits)
        if script.repository == "karpathy/nanoGPT":
            give_nanogpt_its_data(folder / "data" / "text", corpus)
        fill = {"corpus": corpus, "folder": folder, "device": device}
        weights = corpus / f"{script.marker.replace('/', '_')}.pt" if script.same_start else None
        job = Run(
            script=folder / script.file,
            folder=(folder / script.file).parent,
            arguments=[part.format(**fill) for part in script.arguments],
            corpus=corpus,
            device=device,
            launched=script.launched,
            weights=weights,
        )
        job = start(job, Path(held) / "printed.txt")
    if len(job.losses) != script.steps:
        raise Failed(f"{len(job.losses)} steps of {script.steps}: {job.error}")
    return {"losses": job.losses, "keywords": sorted(job.keywords), "diff": diff, "lines": lines, "error": job.error}


def in_a_process(job: Run, printed: Path) -> Run:
    """Run where torch and transformers are imported already and nothing else was done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_and_send, args=(job, printed, sender))
    process.start()
    sender.close()
    try:
        done = receiver.recv()
    except EOFError:
        raise Failed(f"its process ended: {printed.read_text()[-500:]}") from None
    process.join()
    return done


def _run_and_send(job: Run, printed: Path, sender: Any) -> None:
    with open(printed, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        torch.set_num_threads(1)
        sender.send(run(job))


def give_nanogpt_its_data(folder: Path, corpus: Path) -> None:
    import pickle

    folder.mkdir(parents=True)
    for name in ("train.bin", "val.bin"):
        shutil.copy(corpus / "tokens.bin", folder / name)
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": VOCABULARY}))


def row(script: Script, source: Path, corpus: Path, device: str, start: Start = in_a_process) -> dict[str, Any]:
    """The runs of a script, and what is said of them."""
    original = trained(script, source, (), corpus, device, start)
    ours = trained(script, source, script.change, corpus, device, start)
    exact = trained(script, source, script.exact, corpus, device, start) if script.exact else ours
    steps = script.equal_steps or script.steps
    pairs = list(zip(original["losses"][:steps], exact["losses"][:steps], strict=True))
    return {
        "name": script.name,
        "repository": script.repository,
        "commit": commit_of(source, script.repository),
        "lines": ours["lines"],
        "lines_exact": exact["lines"],
        "diff": ours["diff"],
        "diff_exact": exact["diff"],
        "equal_steps": steps,
        "difference": max(abs(a - b) / abs(a) for a, b in pairs),
        "within": script.within,
        "loss": mean(original["losses"]),
        "loss_exact": mean(exact["losses"]),
        "loss_default": mean(ours["losses"]),
        "at_steps": {
            name: {step: told["losses"][step - 1] for step in SHOWN if step <= script.steps}
            for name, told in (("original", original), ("exact", exact), ("default", ours))
        },
        "accepted": sorted({*ours["keywords"], *exact["keywords"]}),
        "refused": [reason for keyword in script.elsewhere if (reason := refusal(*keyword))],
        "ends_with": original["error"],
        "remark": script.remark,
    }


def mean(losses: list[float]) -> float:
    return sum(losses[-LAST:]) / len(losses[-LAST:])


def refusal(kind: str, keyword: str, value: object) -> str:
    """What a class says of a keyword that a script passes elsewhere; nothing if it takes it."""
    from gracile import optim

    try:
        getattr(optim, kind)([torch.nn.Parameter(torch.ones(2, 2))], **{keyword: value})
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


# ---- the table ------------------------------------------------------------------------------------------------------


def page(told: dict[str, Any]) -> str:
    """The table, remarks, and what is changed in each script, as docs/migrating.md has them."""
    return "\n\n".join(filter(None, (table(told), remarks(told), start_of_a_run(told), changes(told)))) + "\n"


def table(told: dict[str, Any]) -> str:
    lines = [
        "| script | commit | lines changed | loss as published | with their arithmetic | largest difference "
        "| with gracile's defaults |",
        "|---" * 7 + "|",
    ]
    for one in told["scripts"]:
        more = one["lines_exact"] - one["lines"]
        count = (
            f"{one['lines']} + {more}"
            if more > 0
            else f"{one['lines']} or {one['lines_exact']}"
            if more
            else one["lines"]
        )
        apart = "the same" if one["difference"] == 0 else f"{one['difference']:.0e}"
        lines.append(
            f"| {one['name']} | {place(one)} | {count} | {one['loss']:.4f} "
            f"| {one['loss_exact']:.4f} | {apart} | {one['loss_default']:.4f} |"
        )
    return "\n".join(lines)


def place(one: dict[str, Any]) -> str:
    if one["repository"] == "huggingface/transformers":
        return f"{one['repository'].split('/')[1]} {one['commit']}"
    return f"[{one['commit']}](https://github.com/{one['repository']}/tree/{one['commit'].split()[0]})"


def remarks(told: dict[str, Any]) -> str:
    """Each once, with the scripts that it is of."""
    of: dict[str, list[str]] = {}
    for one in told["scripts"]:
        said = [
            one["remark"],
            *(f"on a GPU the script passes a keyword that is left out: {r}" for r in one["refused"] if r),
        ]
        if one["ends_with"]:
            said.append(f"as published it stops after its last step, in both runs: {one['ends_with']}")
        for remark in filter(None, said):
            of.setdefault(remark, []).append(one["name"])
    return "\n".join(f"* {'; '.join(names)}: {remark}." for remark, names in of.items())


def start_of_a_run(told: dict[str, Any]) -> str:
    """The first steps of the Trainer, where the default's subspace is not yet warm."""
    one = next((one for one in told["scripts"] if one["name"] == BY_CLASS), None)
    if one is None:
        return ""
    steps = one["at_steps"]["original"]
    lines = [f"| {BY_CLASS}: loss at step | {' | '.join(steps)} |", "|---" * (len(steps) + 1) + "|"]
    for name, key in (("galore-torch", "original"), ("gracile's default", "default")):
        lines.append(f"| {name} | {' | '.join(format(loss, '.3f') for loss in one['at_steps'][key].values())} |")
    return "\n".join(lines)


def changes(told: dict[str, Any]) -> str:
    """Diffs and keywords, each once for the scripts that share them."""
    parts = ["<details>", "<summary>The lines, and the keywords that were passed and accepted</summary>"]
    shared: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in told["scripts"]:
        shared.setdefault((one["diff"], one["diff_exact"]), []).append(one)
    for (diff, exact), rows in shared.items():
        accepted = sorted({key for one in rows for key in one["accepted"]})
        parts.append(
            f"{'; '.join(one['name'] for one in rows)}. Accepted: {', '.join(f'`{key}`' for key in accepted)}."
        )
        parts.append(f"```diff\n{diff}\n```")
        if exact != diff:
            parts.append("For the original's arithmetic " + ("also:" if diff.splitlines()[1] in exact else "instead:"))
            parts.append(f"```diff\n{without(exact, diff)}\n```")
    return "\n\n".join([*parts, "</details>"])


def without(diff: str, known: str) -> str:
    """The lines of a diff that are not in another, under the names of their files."""
    found: list[str] = []
    for line in diff.splitlines():
        if line.startswith("+++") and found and found[-1].startswith("+++"):
            found.pop()  # nothing of the last file is new
        if line.startswith("+++") or line not in known.splitlines():
            found.append(line)
    return "\n".join(found)


def write(told: dict[str, Any], results: Path) -> None:
    """The results, the page beside them and, for the repository's own, the part of docs/migrating.md."""
    results.write_text(json.dumps(told, indent=1) + "\n")
    results.with_suffix(".md").write_text(page(told))
    if results == RESULTS:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        PAGE.write_text(f"{before}{BEGIN}\n{page(told)}\n{END}{after}")


# ---- the command ----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="checkouts of published repositories")
    parser.add_argument("--only", default="", help="scripts whose name has this in it")
    parser.add_argument("--text", default="stdlib", help="a text file or a folder of them; by default Python's source")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    there = checkouts(options.folders)
    told = json.loads(options.results.read_text()) if options.results.exists() else {"scripts": []}
    rows = {one["name"]: one for one in told["scripts"]}
    with tempfile.TemporaryDirectory() as held:
        corpus = Path(held).resolve()
        make_corpus(corpus, options.text)
        for script in SCRIPTS:
            if script.repository in there and options.only in script.name:
                rows.pop(script.name, None)
                try:
                    rows[script.name] = one = row(script, there[script.repository], corpus, options.device)
                except Failed as error:
                    print(f"{script.name}: left out, {error}", flush=True)
                else:
                    print(f"{script.name}: {one['loss']:.4f}, largest difference {one['difference']:.1e}", flush=True)
    told["scripts"] = [rows[script.name] for script in SCRIPTS if script.name in rows]
    told["run"] = {"text": Path(options.text).name, "device": options.device, "python": platform.python_version()}
    told["run"] |= {name: metadata.version(name) for name in ("torch", "transformers", "bitsandbytes")}
    write(told, options.results)
    print(table(told))


if __name__ == "__main__":
    main()
