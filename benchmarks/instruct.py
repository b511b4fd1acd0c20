"""Instruction tuning from end to end: a run, the same run killed with SIGKILL and taken up again, and what both say.

    python benchmarks/instruct.py            # LLaMA-60M and a small Qwen2, one process and ZeRO 2 on two
    python benchmarks/instruct.py --runs "Qwen2, SORSA" --steps 6

Conversations are made of the docstrings of Python's standard library, as jsonl. The LLaMA has the shape of the recipes
``llama_60m_*`` and some steps of pretraining, the Qwen2 (grouped queries, biases, tied embeddings) random weights. Each
line is ``gracile finetune`` three times: whole; with the whole process group killed while it trains, after a
checkpoint; and resumed. It ends with an error where the resumed run is not the whole one, to the bit: every logged
loss, norm and rate, every weight that is exported. Both must answer through ``transformers.pipeline``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from gracile.train.data.corpus import stdlib_files
from gracile.train.data.docstrings import questions

RESULTS = Path(__file__).parent / "results"
ZERO_2 = Path(__file__).parents[1] / "configs" / "deepspeed" / "zero2.json"
ASKED = "What does shutil's copyfile(src, dst) do?"
GALORE = {"optimizer": "galore_adamw", "rank": 64, "update_proj_gap": 4, "learning_rate": 0.003}
SORSA = {"adapter": "sorsa", "adapter_args": {"r": 16, "gamma": 0.01}, "learning_rate": 1e-3}
S2FT = {"selection": "s2ft", "selection_args": {"down_ratio": 0.05, "o_ratio": 0.25}, "learning_rate": 1e-3}
# name in the table -> model, processes and settings; on two processes under ZeRO 2, with as many tokens a step
RUNS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "LLaMA-60M, GaLore": ("llama", 1, GALORE),
    "LLaMA-60M, SORSA, ZeRO 2": ("llama", 2, SORSA),
    "Qwen2, SORSA": ("qwen", 1, SORSA),
    "Qwen2, S2FT": ("qwen", 1, S2FT),
    "Qwen2, GaLore, ZeRO 2": ("qwen", 2, GALORE),
    "Qwen2, SORSA, ZeRO 2": ("qwen", 2, SORSA),
}
ROWS, BLOCK = 8, 128  # of a step: 1,024 tokens
COMMON = {
    "chat_template": "zephyr",
    "forgetting_dataset": "stdlib",
    "block_size": BLOCK,
    "too_long": "drop",
    "packing": True,
    "validation_examples": 16,
    "per_device_eval_batch_size": ROWS,
    "max_grad_norm": 1.0,
    "warmup_steps": 2,
    "logging_steps": 1,
    "save_total_limit": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 0,
}


def conversations(file: Path) -> None:
    """Questions and answers as a chat client keeps them, in a random order."""
    rows = [row for source in stdlib_files() for row in questions(source)]
    random.Random(0).shuffle(rows)
    with file.open("w", encoding="utf-8") as out:
        for row in rows[:2000]:
            turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]
            print(json.dumps({"messages": turns}), file=out)


def bases(folder: Path, threads: int) -> dict[str, Path]:
    """The LLaMA after a few steps of pretraining, and a Qwen2 with its tokenizer; it embeds more, as all of them do."""
    llama, qwen = folder / "llama", folder / "qwen"
    given = ["--model", "60m", "--model_overrides", '{"vocab_size": 32100}', "--max_steps", "4", "--warmup_steps", "1"]
    given += ["--per_device_train_batch_size", str(ROWS), "--validation_blocks", "16", "--save_strategy", "no"]
    started([sys.executable, "-m", "gracile.train.pretrain", "quickstart", *given, "--output_dir", str(llama)], threads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer) + 156, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(qwen)
    tokenizer.save_pretrained(qwen)
    return {"llama": llama, "qwen": qwen}


def started(command: list[str], threads: int, kill_after: int | None = None) -> float:
    """Seconds that a command took to its end, or to its death in the step after ``kill_after``."""
    given = {**os.environ, "OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"}
    begun, printed = time.perf_counter(), []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=given, start_new_session=True
    ) as run:
        assert run.stdout is not None
        for line in run.stdout:
            printed.append(line)
            if kill_after is not None and line.startswith(f"step {kill_after}/") and "  loss " in f"  {line}":
                os.killpg(run.pid, signal.SIGKILL)  # the launcher and all its processes at once, as a power cut does
                break
        run.stdout.read()
    if (run.returncode == 0) is (kill_after is not None):
        sys.exit("".join(printed)[-3000:])
    return time.perf_counter() - begun


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = [*folder.glob("*.safetensors"), *(folder / "adapter").glob("*.safetensors")]
    return {f"{file.name} {key}": value for file in files for key, value in load_file(file).items()}


def answer(folder: Path) -> str:
    say = transformers.pipeline("text-generation", model=str(folder))
    turns = say([{"role": "user", "content": ASKED}], max_new_tokens=16, do_sample=False)[0]["generated_text"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"]
    said: str = turns[-1]["content"]
    return said


def measured(name: str, folder: Path, base: dict[str, Path], data: Path, given: argparse.Namespace) -> dict[str, Any]:
    """A line of the table."""
    model, processes, settings = RUNS[name]
    keys = {**COMMON, **settings, "model": str(base[model]), "dataset": str(data), "max_steps": given.steps}
    keys["save_steps"] = max(1, given.steps // 3)
    keys["per_device_train_batch_size"] = ROWS // processes
    config = folder / "run.yaml"
    config.write_text(json.dumps(keys))  # JSON is YAML
    command = [sys.executable, "-m", "gracile.train.finetune"]
    if processes > 1:
        launcher = str(Path(sys.executable).with_name("deepspeed"))
        command = [launcher, "--num_accelerators", str(processes), "--module", "gracile.train.finetune"]
    command += [str(config), *(["--deepspeed", str(ZERO_2)] if processes > 1 else [])]
    killed_after = given.steps // 2 + 1
    whole, again = folder / "whole", folder / "again"
    seconds = started([*command, "--output_dir", str(whole)], given.threads)
    started([*command, "--output_dir", str(again)], given.threads, kill_after=killed_after)
    (checkpoint,) = again.glob("checkpoint-*/complete.json")
    assert not (again / "metrics.json").exists()
    started([*command, "--output_dir", str(again), "--resume_from_checkpoint", "true"], given.threads)
    one, other = (json.loads((out / "metrics.json").read_text()) for out in (whole, again))
    mine, theirs = weights(whole), weights(again)
    return {
        "name": name,
        "processes": processes,
        "steps": given.steps,
        "killed_after": killed_after,
        "resumed_from": int(checkpoint.parent.name.rpartition("-")[2]),
        "same_history": other["history"] == one["history"],
        "same_weights": mine.keys() == theirs.keys() and all(torch.equal(theirs[key], mine[key]) for key in mine),
        "same_answer": answer(again) == answer(whole),
        "answer": answer(again),
        "final_train_loss": [entry["loss"] for entry in one["history"] if "loss" in entry][-1],
        "final_train_loss_resumed": [entry["loss"] for entry in other["history"] if "loss" in entry][-1],
        "seconds": round(seconds, 1),
        **{key: one[key] for key in ("parameters", "trainable_parameters", "optimizer_state_bytes")},
        **{key: one[key] for key in ("validation_loss_before", "validation_loss", "forgetting_loss")},
    }


def table(results: dict[str, Any]) -> str:
    columns = (
        "run",
        "processes",
        "trained",
        "state of each, MiB",
        "loss before",
        "after",
        "killed after",
        "resumed from",
    )
    columns += ("last training loss", "resumed", "same bits", "answers")
    lines = [
        f"{results['steps']} steps of {ROWS * BLOCK:,} tokens, on CPUs; torch {results['torch']}.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for one in results["runs"]:
        same = one["same_history"] and one["same_weights"]
        cells = [
            one["name"], one["processes"], f"{one['trainable_parameters']:,} of {one['parameters']:,}",
            f"{one['optimizer_state_bytes'] / 2**20:.2f}", f"{one['validation_loss_before']:.4f}",
            f"{one['validation_loss']:.4f}", f"step {one['killed_after']}", f"step {one['resumed_from']}",
            one["final_train_loss"], one["final_train_loss_resumed"], "yes" if same else "NO",
            "alike" if one["same_answer"] else "NO",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="*", default=list(RUNS), choices=list(RUNS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of instruct.md and instruct.json")
    given = parser.parse_args()
    results: dict[str, Any] = {"steps": given.steps, "python": platform.python_version(), "torch": torch.__version__}
    file, results["runs"] = given.results / "instruct.json", []
    held = json.loads(file.read_text()) if file.exists() else {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        conversations(folder / "chats.jsonl")
        base = bases(folder, given.threads)
        for number, name in enumerate(given.runs):
            own = folder / str(number)
            own.mkdir()
            results["runs"].append(measured(name, own, base, folder / "chats.jsonl", given))
            print(json.dumps(results["runs"][-1]), flush=True)
    if held.get("steps") == given.steps:  # lines that were not run again
        results["runs"] += [one for one in held["runs"] if one["name"] not in given.runs]
        results["runs"].sort(key=lambda one: list(RUNS).index(one["name"]))
    file.write_text(json.dumps(results, indent=1) + "\n")
    (given.results / "instruct.md").write_text(table(results) + "\n")
    print(table(results))
    return (
        0 if all(one["same_history"] and one["same_weights"] and one["same_answer"] for one in results["runs"]) else 1
    )


if __name__ == "__main__":
    sys.exit(main())
