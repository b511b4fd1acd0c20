"""The gradient of every way to the terms beside one of a loss that is written out by hand, in one pass a step and in
four: once a step, whoever computes the loss and whatever it is divided by."""

import warnings

import pytest
import torch
from adapted import attached, ids, llama
from losses_by_hand import KEYS, batch, by_hand, cross_entropy, grads_of, moved
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from gracile import adapters

each = pytest.mark.parametrize("name", KEYS)
passes = pytest.mark.parametrize("count", [1, 4])


def alike(found, expected):
    assert found.keys() == expected.keys()
    for key, grad in expected.items():
        assert (found[key] - grad).norm() <= 1e-4 * grad.norm() + 1e-7, key


# ---- a script of one's own ------------------------------------------------------------------------------------------


@each
@passes
@pytest.mark.parametrize("own", [False, True], ids=["of the model", "of the script"])
def test_in_a_loop_that_divides_by_the_labels_of_a_step(name, count, own):
    model, (x, labels) = moved(name), batch()
    total = (labels[:, 1:] != -100).sum()
    for part, said in zip(x.chunk(count), labels.chunk(count), strict=True):
        if own:
            outputs = model(input_ids=part)
            loss = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), said[:, 1:].flatten(), reduction="sum") / total
            loss = adapters.with_penalty(model, loss, outputs, said, total)
        else:
            loss = model(input_ids=part, labels=said, num_items_in_batch=total).loss
        loss.backward()
    alike(grads_of(model), by_hand(name, count))


@each
def test_in_a_loop_that_divides_by_the_passes(name):
    """With as many labels in each pass that is the same."""
    model, x = moved(name), ids(4)
    for part in x.chunk(4):
        outputs = model(input_ids=part)
        loss = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), part[:, 1:].flatten())
        (adapters.with_penalty(model, loss, outputs, part) / 4).backward()
    other = moved(name)
    for part in x.chunk(4):
        other(input_ids=part, labels=part, num_items_in_batch=44).loss.backward()
    alike(grads_of(model), grads_of(other))


def test_a_model_that_returns_tuples():
    model, other, (x, labels) = moved("balora"), moved("balora"), batch()
    loss = other(input_ids=x, labels=labels).loss
    found = model(input_ids=x, labels=labels, return_dict=False)
    assert abs(found[0] - loss) < 1e-6
    outputs = model(input_ids=x, return_dict=False)
    plain = F.cross_entropy(outputs[0][:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert abs(adapters.with_penalty(model, plain, outputs, labels) - loss) < 1e-5


# ---- the Trainer ----------------------------------------------------------------------------------------------------


class Gradient(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **keywords):
        self.found = grads_of(model)


def gradient_in_trainer(model, rows, folder, count, **keys):
    given = {key: keys.pop(key) for key in list(keys) if key == "label_smoothing_factor"}
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=len(rows) // count, gradient_accumulation_steps=count, max_steps=1,
        max_grad_norm=0, learning_rate=0.0, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", **given,
    )  # fmt: skip
    callback = Gradient()
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback], **keys)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    trainer.train()
    return callback.found


def smoothed(outputs, labels, num_items_in_batch=None):
    return LabelSmoother(0.1)(outputs, labels, shift_labels=True, num_items_in_batch=num_items_in_batch)


@each
@passes
@pytest.mark.parametrize("own", [None, cross_entropy, smoothed], ids=["of the model", "own", "smoothed"])
def test_in_a_trainer(name, count, own, tmp_path):
    model, (x, labels) = moved(name), batch()
    rows = [{"input_ids": row, "labels": said} for row, said in zip(x, labels, strict=True)]
    keys = {} if own is None else {"compute_loss_func": adapters.penalized_loss(model, own)}
    found = gradient_in_trainer(model, rows, tmp_path, count, **keys)
    alike(found, by_hand(name, count, smoothing=0.1 if own is smoothed else 0.0))


class OwnTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = cross_entropy(outputs, labels, num_items_in_batch)
        loss = adapters.with_penalty(model, loss, outputs, labels, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


def test_in_a_trainer_that_computes_its_loss(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "Trainer", OwnTrainer)
    model, (x, labels) = moved("balora"), batch()
    rows = [{"input_ids": row, "labels": said} for row, said in zip(x, labels, strict=True)]
    alike(gradient_in_trainer(model, rows, tmp_path, 4), by_hand("balora", 4))


def classifier():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_labels=5,
        pad_token_id=0,
    )  # fmt: skip
    keys = {"r": 4, "target_modules": ["q_proj"], "task_type": "SEQ_CLS", "gamma": 1.0}
    model = get_peft_model(LlamaForSequenceClassification(config), adapters.SorsaConfig(**keys))
    with torch.no_grad():
        next(adapters.adapter_layers(model)).sorsa_U["default"].mul_(2)
    return model


@pytest.mark.parametrize("count", [1, 2, 4])
def test_labels_of_classes_are_all_counted(count, tmp_path):
    rows = [{"input_ids": row, "labels": i % 5} for i, row in enumerate(ids(4))]
    model = classifier()
    expected = torch.autograd.grad(adapters.penalty(model), next(adapters.adapter_layers(model)).sorsa_U["default"])[0]
    found = gradient_in_trainer(model, rows, tmp_path, count)
    key = next(key for key in found if "sorsa_U" in key)
    assert (found[key] - expected).norm() < 0.05 * expected.norm()


# ---- what is told ---------------------------------------------------------------------------------------------------


def test_what_is_refused():
    model, (x, labels) = moved("sorsa"), batch()
    outputs = model(input_ids=x, labels=labels)
    with pytest.raises(ValueError, match="outputs must have no loss, for the model has added its adapters' terms"):
        adapters.with_penalty(model, outputs.loss, outputs, labels)
    outputs = model(input_ids=x)
    loss = outputs.logits.mean()
    with pytest.raises(ValueError, match="labels must be given with num_items_in_batch"):
        adapters.with_penalty(model, loss, outputs, None, 4)
    assert adapters.with_penalty(model, loss, outputs) > loss
    with pytest.raises(ValueError, match="whose terms were not added before"):
        adapters.with_penalty(model, loss, outputs)


def test_where_there_is_nothing_to_add():
    model = moved("sorsa")
    loss = model.eval()(input_ids=ids()).logits.mean()
    assert adapters.with_penalty(model, loss, {"logits": loss}) is loss
    model = attached("sorsa", gamma=0.0).train()
    outputs = model(input_ids=ids())
    assert adapters.with_penalty(model, loss, outputs) is loss
    assert adapters.with_penalty(llama().train(), loss, outputs) is loss


@pytest.mark.parametrize("name", ["sorsa", "balora"])
def test_a_loss_without_the_terms_is_told(name):
    """As a Trainer's label smoothing has it."""
    for keys, expected in ((KEYS[name], 1), (dict.fromkeys(KEYS[name], 0.0), 0)):
        model = attached(name, **keys).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            model(input_ids=ids()).logits.square().mean().backward()
            optimizer.step()
        assert sum("terms are left out" in str(one.message) for one in told) == expected


def test_a_pass_without_labels_has_no_part_in_the_terms_of_tokens():
    model = moved("balora")
    x = ids()
    loss = model(input_ids=x, labels=torch.full_like(x, -100), num_items_in_batch=7).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_compiled_step_beside_a_model_with_adapters():
    model, other = moved("sorsa"), get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    sparse = adapters.SparseLora(other, 0.5)
    held = [p for one in (model, other) for p in one.parameters() if p.requires_grad]
    before = held[0].detach().clone()
    optimizer = torch.optim.AdamW(held, lr=0.1)
    model(input_ids=ids(), labels=ids()).loss.backward()
    torch.compile(optimizer.step, backend="eager")()
    assert model.base_model.steps == sparse.steps == 1
    assert not torch.equal(held[0], before)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["balora", "sorsa"])
def test_compiled_it_is_the_same(name):
    """With a break of the graph, where what the terms are made of is put aside."""
    found, (x, labels) = [], batch()
    for backend in (None, "aot_eager"):
        model = moved(name)
        call = model.get_base_model() if backend is None else torch.compile(model.get_base_model(), backend=backend)
        outputs = call(input_ids=x)
        adapters.with_penalty(model, outputs.logits.square().mean(), outputs, labels).backward()
        found.append(grads_of(model))
    alike(*found)


def test_terms_of_weights_for_any_adapter():
    torch.manual_seed(0)
    one, other, weight, fisher = (torch.randn(5, 7) for _ in range(4))
    assert torch.isclose(adapters.fisher_term(one, fisher), (fisher * one * one).sum())
    assert torch.isclose(adapters.angle_term(one, -2 * one), torch.tensor(1.0))
    active = torch.sigmoid((weight + one + other).abs() - weight.abs().median())
    assert torch.isclose(
        adapters.overlap_term(one, other, weight, 0.5), ((1 + 0.5 * active) * (one * other).abs()).sum()
    )
