"""Which published scripts ``published_scripts.py`` runs, how, and what is changed in them.

No line of theirs is here but those that are replaced, for these are what the promise is about.
"""

from __future__ import annotations

from dataclasses import dataclass

STEPS, GAP, RANK, BATCH, LENGTH = 60, 20, 16, 8, 64
VOCABULARY = 4096


@dataclass(frozen=True)
class Edit:
    """Lines of a file of the checkout, and what comes in their place."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Script:
    """One script with one of its optimizers.

    Attributes:
        name: in the table.
        repository: on GitHub; ``marker`` is a file by which a checkout of it is known.
        file: the script; it is started in its own folder.
        arguments: ``{corpus}`` and ``{folder}`` are filled in.
        change: what makes it use gracile.
        exact: what makes the arithmetic that of the original as well; nothing where ``change`` does.
        remark: what else is to be said of the row.
        copied: what is taken of the checkout, all of it if nothing is named.
        launched: whether by torchrun.
        same_start: whether the first weights and random numbers of the original are taken over.
        equal_steps: for how many steps losses are to be equal; None for all.
        within: by how much they may differ, relatively.
        steps: how many it makes.
        elsewhere: keywords that the script passes on other machines than a CPU.
    """

    name: str
    repository: str
    marker: str
    file: str
    arguments: tuple[str, ...]
    change: tuple[Edit, ...]
    exact: tuple[Edit, ...] = ()
    remark: str = ""
    copied: tuple[str, ...] = ()
    launched: bool = True
    same_start: bool = False
    equal_steps: int | None = None
    within: float = 1e-5
    steps: int = STEPS
    elsewhere: tuple[tuple[str, str, object], ...] = ()


def options(**given: object) -> tuple[str, ...]:
    return tuple(part for key, value in given.items() for part in (f"--{key}", str(value)))


C4 = options(
    model_config="{corpus}/config.json",
    batch_size=BATCH,
    total_batch_size=BATCH,
    max_length=LENGTH,
    warmup_steps=6,
    num_training_steps=STEPS - 1,  # they make one step more
    workers=0,
    dtype="float32",
    eval_every=1000,
    rank=RANK,
    save_dir="{folder}/out",
)
SVD, SVD_KEY = '"subspace_method": "svd"', 'subspace_method="svd"'

# ---- GaLore ---------------------------------------------------------------------------------------------------------

_GALORE_IMPORT = Edit(
    "torchrun_main.py",
    "from galore_torch import GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor",
    "from gracile.optim import GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor",
)
_GALORE_GROUP = (
    "                        {'params': galore_params, 'rank': args.rank, 'update_proj_gap': args.update_proj_gap, "
    "'scale': args.galore_scale, 'proj_type': args.proj_type}]"
)
_GALORE_LAYER = (
    "                    optimizer_dict[p] = GaLoreAdamW8bit([{'params': [p], 'rank': args.rank, 'update_proj_gap': "
    "args.update_proj_gap * 2, 'scale': args.galore_scale, 'proj_type': args.proj_type}], lr=args.lr, "
    "weight_decay=args.weight_decay)"
)


def _galore(optimizer: str, group: str = _GALORE_GROUP, lr: float = 0.01, **more: object) -> Script:
    return Script(
        name=f"GaLore, `{optimizer}`",
        repository="jiaweizzhao/GaLore",
        marker="galore_torch/galore_projector.py",
        file="torchrun_main.py",
        arguments=C4 + options(optimizer=optimizer, lr=lr, galore_scale=0.25, update_proj_gap=GAP),
        change=(_GALORE_IMPORT,),
        exact=(
            _GALORE_IMPORT,
            Edit("torchrun_main.py", group, group.replace("args.proj_type}", f"args.proj_type, {SVD}}}")),
        ),
        **more,
    )


# ---- APOLLO ---------------------------------------------------------------------------------------------------------

_APOLLO_IMPORT = Edit(
    "utils/setup.py",
    "from apollo_torch import GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor, APOLLOAdamW, QAPOLLOAdamW",
    "from gracile.optim import GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor, APOLLOAdamW",
)


def _apollo(
    name: str, arguments: tuple[str, ...], exact: tuple[Edit, ...] = (), lr: float = 0.01, **more: object
) -> Script:
    return Script(
        name=f"APOLLO, {name}",
        repository="zhuhanqing/APOLLO",
        marker="apollo_torch/apollo.py",
        file="main_pretrain.py",
        arguments=C4 + options(lr=lr, update_proj_gap=GAP) + arguments,
        change=(_APOLLO_IMPORT,),
        exact=exact,
        **more,
    )


_APOLLO_GALORE_GROUP = Edit(
    "main_pretrain.py",
    '                "queue_size": args.queue_size,',
    f'                "queue_size": args.queue_size, {SVD},',
)

# ---- Fira -----------------------------------------------------------------------------------------------------------

_FIRA_GROUP = (
    "                        {'params': gradient_projection_params, 'rank': args.rank, 'update_proj_gap': "
    "args.update_proj_gap, 'alpha': args.alpha, 'proj_type': args.proj_type}]"
)


def _fira(optimizer: str) -> Script:
    file = "pre_training_c4/torchrun_main.py"
    imported = Edit(
        file,
        "from optimizer_torch import FiraAdamW, GaLoreAdamW, GaLoreRMSProp, FiraRMSProp  ",
        "from gracile.optim import FiraAdamW, GaLoreAdamW",
    )
    group = Edit(file, _FIRA_GROUP, _FIRA_GROUP.replace("args.proj_type}", f"args.proj_type, {SVD}}}"))
    return Script(
        name=f"Fira, `{optimizer}`",
        repository="xichen-fy/Fira",
        marker="pre_training_c4/torchrun_main.py",
        file=file,
        arguments=C4 + options(optimizer=optimizer, lr=0.01, alpha=0.25, update_proj_gap=GAP),
        change=(imported,),
        exact=(imported, group),
    )


# ---- scripts whose optimizer is torch's -----------------------------------------------------------------------------

SLTRAIN = Script(
    name="SLTrain, `adamw`",
    repository="andyjm3/SLTrain",
    marker="splora/splora_linear.py",
    file="torchrun_main.py",
    arguments=C4 + options(optimizer="adamw", peft_model="sltrain", lr=0.003, sp_ratio=0.03, lora_alpha=32),
    change=(
        Edit(
            "train_utils.py",
            "from splora import SpLoRaModel",
            "from gracile.models.convert import convert\n"
            "from gracile.models.layers import SparseLowRankLinear\n"
            "from gracile.optim import SLTrainAdamW",
        ),
        Edit(
            "train_utils.py",
            "        model = SpLoRaModel(\n"
            "            model,\n"
            "            r=args.rank,\n"
            "            lora_alpha=args.lora_alpha,\n"
            "            lora_dropout=args.lora_dropout,\n"
            "            target_modules=args.target_modules,\n"
            "            sp_ratio=args.sp_ratio,\n"
            "            trainable_scaling=args.train_scaling,\n"
            "        )",
            "        keys = dict(rank=args.rank, alpha=args.lora_alpha, density=args.sp_ratio)\n"
            "        model = convert(model, SparseLowRankLinear, args.target_modules, **keys)",
        ),
        Edit(
            "train_utils.py",
            "        optimizer = torch.optim.AdamW(trainable_params, lr=args.lr, weight_decay=args.weight_decay)",
            "        optimizer = SLTrainAdamW(trainable_params, lr=args.lr, weight_decay=args.weight_decay)",
        ),
    ),
    same_start=True,
    remark="their layers and torch's AdamW against `SparseLowRankLinear` and `SLTrainAdamW`, from the same first "
    "weights",
)

RELORA = Script(
    name="ReLoRA, `adam`",
    repository="Guitaricet/relora",
    marker="peft_pretraining/relora.py",
    file="torchrun_main.py",
    arguments=options(
        model_config="{corpus}/config.json",
        dataset_path="{corpus}/blocks",
        batch_size=BATCH,
        total_batch_size=BATCH,
        max_length=LENGTH,
        use_peft="true",
        lora_r=RANK,
        relora=GAP,
        cycle_length=GAP,
        scheduler="cosine_restarts",
        restart_warmup_steps=4,
        warmup_steps=4,
        num_training_steps=STEPS,
        optimizer="adam",
        lr=0.005,
        workers=0,
        dtype="float32",
        eval_every=1000,
        save_dir="{folder}/out",
    ),
    change=(
        Edit(
            "torchrun_main.py",
            "from peft_pretraining.relora import ReLoRaModel, ReLoRaLinear, merge_and_reinit_functional",
            "from peft_pretraining.relora import ReLoRaModel, ReLoRaLinear, merge_and_reinit_functional\n"
            "from gracile.models.convert import convert\n"
            "from gracile.models.layers import ReLoRALinear\n"
            "from gracile.optim import ReLoRAAdamW",
        ),
        Edit(
            "torchrun_main.py",
            "        model = ReLoRaModel(\n"
            "            model,\n"
            "            r=args.lora_r,\n"
            "            lora_alpha=args.lora_alpha,\n"
            "            lora_dropout=0.1,\n"
            '            target_modules=["attn", "attention", "mlp"],\n'
            "            trainable_scaling=args.train_scaling,\n"
            "            keep_original_weights=True,\n"
            "            lora_only=not need_linear_weight,\n"
            "            quantize=args.quantize,\n"
            "            use_double_quant=args.use_double_quant,\n"
            "        )",
            "        keys = dict(rank=args.lora_r, alpha=args.lora_alpha, dropout=0.1)\n"
            '        model = convert(model, ReLoRALinear, ["attn", "attention", "mlp"], **keys)',
        ),
        Edit(
            "torchrun_main.py",
            '    lora_params = [p for n, p in model.named_parameters() if p.requires_grad and "lora_" in n]',
            '    lora_params = [p for n, p in model.named_parameters() if p.requires_grad and n[-2:] in (".A", ".B")]',
        ),
        Edit(
            "torchrun_main.py",
            "        optimizer = torch.optim.AdamW(trainable_params, **optimizer_kwargs)",
            "        clocks = dict(merge_every=args.relora, reset_every=args.cycle_length)\n"
            "        optimizer = ReLoRAAdamW(trainable_params, **optimizer_kwargs, **clocks)",
        ),
        Edit(
            "torchrun_main.py",
            "        can_reset_relora = args.relora is not None and (",
            "        can_reset_relora = False and (",
        ),
        Edit(
            "torchrun_main.py",
            "        can_reset_optimizer = args.relora is not None and (",
            "        can_reset_optimizer = False and (",
        ),
    ),
    same_start=True,
    equal_steps=GAP + 1,
    remark="their layers, merges, resets and torch's AdamW against `ReLoRALinear` and `ReLoRAAdamW`, from the same "
    f"first weights; compared up to the first merge at step {GAP}, after which A is drawn by other generators",
)

_ADAMW = "        optimizer = torch.optim.AdamW(optim_groups, lr=learning_rate, betas=betas, **extra_args)"
_GPT_IMPORT = "import torch.nn as nn"
NANOGPT = Script(
    name="nanoGPT",
    repository="karpathy/nanoGPT",
    marker="configurator.py",
    file="train.py",
    launched=False,
    arguments=(
        "--device={device}",
        "--compile=False",
        "--dtype=float32",
        "--dataset=text",
        f"--block_size={LENGTH}",
        f"--batch_size={BATCH}",
        "--gradient_accumulation_steps=1",
        "--n_layer=4",
        "--n_head=4",
        "--n_embd=128",
        "--learning_rate=0.003",
        "--warmup_iters=6",
        f"--max_iters={STEPS - 1}",
        f"--lr_decay_iters={STEPS}",
        "--eval_interval=1000",
        "--eval_iters=1",
    ),
    change=(
        Edit("model.py", _GPT_IMPORT, f"{_GPT_IMPORT}\nfrom gracile.optim import GaLoreAdamW, param_groups"),
        Edit(
            "model.py",
            _ADAMW,
            f"        keys = dict(rank={RANK}, update_proj_gap={GAP}, scale=0.25, weight_decay=weight_decay)\n"
            '        optim_groups = param_groups(self, target_modules=["attn", "mlp"], **keys)\n'
            "        optimizer = GaLoreAdamW(optim_groups, lr=learning_rate, betas=betas)",
        ),
    ),
    exact=(
        Edit("model.py", _GPT_IMPORT, f"{_GPT_IMPORT}\nfrom gracile.optim import RigLAdamW"),
        Edit("model.py", _ADAMW, "        optimizer = RigLAdamW(optim_groups, lr=learning_rate, betas=betas)"),
    ),
    elsewhere=(("RigLAdamW", "fused", True),),
    remark="torch's AdamW against `RigLAdamW` without a `sparsity`, which is AdamW; by default against `GaLoreAdamW`",
)

# ---- transformers and LLaMA-Factory ---------------------------------------------------------------------------------

_TRAINER = options(corpus="{corpus}", device="{device}", rank=RANK, gap=GAP, length=LENGTH, batch=BATCH, steps=STEPS)


def _transformers(
    optim: str, change: Edit, exact: Edit | None = None, name: str = "", lr: float = 0.01, **more: object
) -> Script:
    return Script(
        name=name or f'Trainer, `optim="{optim}"`',
        repository="huggingface/transformers",
        marker="trainer_optimizer.py",
        file="trainer.py",
        launched=False,
        copied=("trainer_optimizer.py",),
        arguments=_TRAINER
        + options(
            source="{folder}/trainer_optimizer.py",
            optim=optim,
            optim_args=f"rank={RANK},update_proj_gap={GAP}",
            lr=lr,
        ),
        change=(change,),
        exact=() if exact is None else (exact,) if exact.old == change.old else (change, exact),
        **more,
    )


_GALORE_TRAINER = Edit(
    "trainer_optimizer.py",
    "    from galore_torch import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit",
    "    from gracile.optim import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit",
)
_APOLLO_TRAINER = Edit(
    "trainer_optimizer.py", "    from apollo_torch import APOLLOAdamW", "    from gracile.optim import APOLLOAdamW"
)
_SVD_TRAINER = Edit(
    "trainer_optimizer.py",
    '        "scale": float(ctx.optim_args.pop("scale", 0.25)),',
    f'        "scale": float(ctx.optim_args.pop("scale", 0.25)), {SVD},',
)
BY_CLASS = "Trainer, `optimizer_cls_and_kwargs`"
_BUILT_HERE = "Trainer(model, arguments, train_dataset=dataset, optimizers=(built, None)).train()"
_BY_CLASS = (
    "from gracile.optim import GaLoreAdamW, param_groups\n"
    f'groups = param_groups(model, rank={RANK}, target_modules=["attn", "mlp"], update_proj_gap={GAP}%s)\n'
    'keys = {"params": groups, "lr": arguments.learning_rate}\n'
    "Trainer(model, arguments, train_dataset=dataset, optimizer_cls_and_kwargs=(GaLoreAdamW, keys)).train()"
)


def _factory(
    use: str,
    optim: str,
    change: Edit,
    exact: Edit | None = None,
    layerwise: bool = False,
    lr: float = 0.001,  # its examples have 1e-5, to finetune
    **more: object,
) -> Script:
    file = "src/llamafactory/train/trainer_utils.py"
    return Script(
        name=f"LLaMA-Factory, {use}, `{optim}`{', layer-wise' if layerwise else ''}",
        repository="hiyouga/LLaMA-Factory",
        marker=file,
        file="trainer.py",
        launched=False,
        copied=(file,),
        arguments=_TRAINER
        + options(source=f"{{folder}}/{file}", optim=optim, use=use, lr=lr)
        + (("--layerwise",) if layerwise else ()),
        change=(change,),
        exact=() if exact is None else (change, exact),
        **more,
    )


_GALORE_FACTORY = Edit(
    "src/llamafactory/train/trainer_utils.py",
    "    from galore_torch import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit  # type: ignore",
    "    from gracile.optim import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit  # type: ignore",
)
_APOLLO_FACTORY = Edit(
    "src/llamafactory/train/trainer_utils.py",
    "    from apollo_torch import APOLLOAdamW  # type: ignore",
    "    from gracile.optim import APOLLOAdamW  # type: ignore",
)
_SCALE_FRONT = (
    "it puts `scale_front` into the group, where apollo-torch does not look for it and gracile does: the same at its "
    "default, False"
)
_SVD_FACTORY = Edit(
    "src/llamafactory/train/trainer_utils.py",
    '        "proj_type": finetuning_args.galore_proj_type,',
    f'        "proj_type": finetuning_args.galore_proj_type, {SVD},',
)

# ---- all of them ----------------------------------------------------------------------------------------------------

IN_8_BITS = {
    "lr": 0.003,
    "within": 1e-3,
    "remark": "8 bits, where a rounding moves a code. With bitsandbytes 0.50 their class does not move matrices of "
    "fewer than 4096 moments, for two of its arguments by position, `percentile_clipping` and `block_wise`, are others "
    "there; as published it was run without these two",
}

SCRIPTS: tuple[Script, ...] = (
    _galore("galore_adamw"),
    _galore("galore_adafactor"),
    _galore("galore_adamw8bit", **IN_8_BITS),
    _galore("galore_adamw8bit_per_layer", group=_GALORE_LAYER, **IN_8_BITS),
    _apollo("`apollo_adamw`", options(optimizer="apollo_adamw", scale_type="channel")),
    _apollo(
        "`apollo_adamw`, Mini",
        (*options(optimizer="apollo_adamw", scale_type="tensor", apollo_scale=128, rank=1), "--scale_front"),
        lr=0.001,
        remark="learning rate 0.001: at 0.01 the loss jumps at this size, and roundings grow to 1e-2",
    ),
    _apollo(
        "`galore_adamw`",
        options(optimizer="galore_adamw", galore_scale=0.25),
        (_APOLLO_IMPORT, _APOLLO_GALORE_GROUP),
    ),
    _fira("fira_adamw"),
    _fira("galore_adamw"),
    SLTRAIN,
    RELORA,
    NANOGPT,
    _transformers("galore_adamw", _GALORE_TRAINER, _SVD_TRAINER),
    _transformers("galore_adafactor", _GALORE_TRAINER, _SVD_TRAINER),
    _transformers("galore_adamw_8bit", _GALORE_TRAINER, _SVD_TRAINER, **IN_8_BITS),
    _transformers("galore_adamw_layerwise", _GALORE_TRAINER, _SVD_TRAINER, lr=0.001),
    _transformers("apollo_adamw", _APOLLO_TRAINER),
    _transformers("apollo_adamw_layerwise", _APOLLO_TRAINER, lr=0.001),
    _factory("galore", "adamw_torch", _GALORE_FACTORY, _SVD_FACTORY),
    _factory("galore", "adafactor", _GALORE_FACTORY, _SVD_FACTORY),
    _factory("galore", "adamw_8bit", _GALORE_FACTORY, _SVD_FACTORY, **IN_8_BITS),
    _factory("galore", "adamw_torch", _GALORE_FACTORY, _SVD_FACTORY, layerwise=True),
    _factory("apollo", "adamw_torch", _APOLLO_FACTORY, remark=_SCALE_FRONT),
    _factory("apollo", "adamw_torch", _APOLLO_FACTORY, layerwise=True, remark=_SCALE_FRONT),
    _transformers(
        "galore_adamw",
        Edit("trainer.py", _BUILT_HERE, _BY_CLASS % ""),
        Edit("trainer.py", _BUILT_HERE, _BY_CLASS % f", {SVD_KEY}"),
        name=BY_CLASS,
    ),
)
