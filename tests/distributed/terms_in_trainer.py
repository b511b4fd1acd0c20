"""A step of the Trainer on this process and others, in two passes, beside the loss that is written out.

torchrun --nproc-per-node 2 terms_in_trainer.py FILE [zero2]: the largest distance of a gradient, by method and by who
computes the loss.
"""

import json
import sys
from pathlib import Path

from losses_by_hand import KEYS, batch, by_hand, cross_entropy, moved
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from gracile import adapters

ZERO2 = {
    "zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True,
}  # fmt: skip


def gap(name: str, own: bool, folder: str, **more: object) -> float:
    model, (x, labels) = moved(name), batch()
    rows = [{"input_ids": row, "labels": said} for row, said in zip(x, labels, strict=True)]
    before = {key: p.detach().clone() for key, p in model.named_parameters() if p.requires_grad}
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=1, max_grad_norm=0, optim="sgd",
        learning_rate=1.0, lr_scheduler_type="constant", report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", **more,
    )  # fmt: skip
    loss = adapters.penalized_loss(model, cross_entropy) if own else None
    trainer = Trainer(model, arguments, train_dataset=rows, compute_loss_func=loss)
    trainer._get_train_sampler = lambda *_: SequentialSampler(rows)
    trainer.train()
    after = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}
    expected = by_hand(name, 4)
    return max(float((before[key] - after[key] - grad).norm() / grad.norm()) for key, grad in expected.items())


def main(file: str, engine: str = "") -> None:
    more = {"deepspeed": ZERO2} if engine else {}
    told = {f"{name} {own}": gap(name, own, f"{file}.run", **more) for name in KEYS for own in (False, True)}
    Path(file).write_text(json.dumps(told))


main(*sys.argv[1:])
