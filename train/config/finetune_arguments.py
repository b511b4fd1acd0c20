"""The configuration of a fine-tuning, as dataclasses: what is tuned, what it reads, how it is optimized; and everything
of ``transformers.TrainingArguments``."""

from __future__ import annotations

from dataclasses import dataclass, field

from .arguments import Keywords, MethodArguments, RunArguments, Settings

# What a row can be (data.formats), what is done with one that is too long, and how a base can be quantized.
MESSAGES, PROMPT, TEXT, LABEL = "messages", "prompt", "text", "label"
FORMATS = (MESSAGES, PROMPT, TEXT, LABEL)
REFUSE, DROP, CUT = "refuse", "drop", "cut"
TOO_LONG = (REFUSE, DROP, CUT)
FOUR_BIT = "4bit"
NO_TEMPLATE = "none"


@dataclass
class TunedModelArguments:
    """What is tuned."""

    model: str = field(default="", metadata={"help": "The path of a saved model, or hub:org/name."})
    adapter: str | None = field(
        default=None,
        metadata={
            "help": "A method of peft, or of gracile.adapters, by its name (lora, ...): it is trained and the model "
            "frozen. Without it every weight is trained."
        },
    )
    adapter_args: Keywords | None = field(
        default=None, metadata={"help": 'Fields of the adapter\'s configuration, as a mapping: {"r": 16}.'}
    )
    adapter_from: str | None = field(
        default=None, metadata={"help": "Folder of a saved adapter of this model, to train on from."}
    )
    selection: str | None = field(
        default=None,
        metadata={"help": "A part of the weights that is trained, the others frozen: hft, s2ft or sara."},
    )
    selection_args: Keywords | None = field(
        default=None, metadata={"help": 'Fields of the selection, as a mapping: {"down_ratio": 0.02}.'}
    )
    quantize: str | None = field(
        default=None, metadata={"help": "4bit: the frozen model in bitsandbytes' NF4, beneath an adapter."}
    )
    dtype: str = field(default="float32", metadata={"help": "Dtype of the weights: float32 or bfloat16."})
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "How attention is computed: sdpa, eager, flash_attention_2, ...; by default as transformers."
        },
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that a saved model, tokenizer or data set brings along."}
    )


@dataclass
class TunedDataArguments:
    """What it reads."""

    dataset: list[str] = field(
        default_factory=list,
        metadata={
            "help": "A file, folder or glob of jsonl, json, csv, tsv, parquet or arrow, plain or .gz, .xz, .zst, .bz2 "
            "(of texts also txt and md); a folder of save_to_disk; hub:org/name; stdlib (source text of this Python), "
            "or stdlib-docstrings (questions about it). Several are laid together."
        },
    )
    validation_dataset: str | None = field(
        default=None, metadata={"help": "Data to validate on, in place of a part of dataset."}
    )
    forgetting_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Other data, whose loss before and after says what the model has forgotten; its format is seen "
            "from its columns."
        },
    )
    calibration_examples: int | None = field(
        default=None,
        metadata={
            "help": "Of an adapter that starts from gradients, blocks that it sees before the first step (64): of "
            "dataset, or of forgetting_dataset for what is to be kept (alignguard)."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub data set."})
    format: str | None = field(
        default=None,
        metadata={
            "help": "What a row is: messages of a conversation, prompt and response, text, or text with a label (a "
            "classification head is trained then). Without it, seen from the columns; label is never guessed."
        },
    )
    messages_column: str = field(default="messages", metadata={"help": "Column of messages with role and content."})
    prompt_column: list[str] = field(
        default_factory=lambda: ["prompt"],
        metadata={"help": "Column of the prompt; of several, those that are filled, a blank line between them."},
    )
    response_column: str = field(default="response", metadata={"help": "Column of the response."})
    text_column: str = field(default="text", metadata={"help": "Column of texts."})
    label_column: str = field(default="label", metadata={"help": "Column of labels: texts or whole numbers."})
    encoding: str | None = field(
        default=None,
        metadata={"help": "Encoding of text, JSON and CSV files; by default what a byte order mark says, or UTF-8."},
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Path or hub:org/name of a tokenizer; by default the model's."}
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "A file of a chat template, or zephyr or chatml, in place of the tokenizer's own; none lays prompt "
            "and response end to end."
        },
    )
    block_size: int = field(default=512, metadata={"help": "Most tokens of an example."})
    too_long: str = field(
        default=REFUSE,
        metadata={"help": "What is done with a longer one: refuse, drop or cut (its end). Texts go on in the next."},
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Lay several examples into a block, none of which attends to another; else padded."},
    )
    validation_examples: int = field(
        default=200, metadata={"help": "Examples held out for validation, at most a tenth; and how many are read."}
    )
    ignore_data_changes: bool = field(
        default=False, metadata={"help": "Resume although the data is not what the run began with."}
    )

    def __post_init__(self) -> None:
        for key in ("dataset", "prompt_column"):
            value = getattr(self, key)
            setattr(self, key, [value] if isinstance(value, str) else value)


@dataclass
class TunedMethodArguments(MethodArguments):
    """How it is optimized."""

    optimizer: str = field(
        default="adamw",
        metadata={"help": "Any optimizer that needs no layer of its own, as `gracile list optimizers` has them."},
    )


@dataclass(frozen=True)
class FinetuneConfig(Settings[TunedModelArguments, TunedDataArguments, TunedMethodArguments]):
    """A resolved configuration of ``gracile finetune``."""

    command = "finetune"
    groups = (TunedModelArguments, TunedDataArguments, TunedMethodArguments, RunArguments)

    @property
    def has_adapter(self) -> bool:
        return self.model.adapter is not None or self.model.adapter_from is not None

    @property
    def classifies(self) -> bool:
        return self.data.format == LABEL
