"""A teacher's share of the loss: the divergence by its definition, the tokens that count, and nothing else changed."""

import pytest
import torch
from helpers import same, weights
from transformers import LlamaConfig, LlamaForCausalLM

from gracile.train.pretrain import main
from gracile.train.run.distillation import Teacher, divergence


def logits(seed, dtype=torch.float64):
    return 2 * torch.randn(2, 6, 11, generator=torch.Generator().manual_seed(seed)).to(dtype)


def labels():
    chosen = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(3))
    chosen[0, :3], chosen[1, 4] = -100, -100
    return chosen


def brute_force(student, teacher, labels):
    """The sum and the count, token by token."""
    total, count = 0.0, 0
    for example in range(len(labels)):
        for place in range(labels.shape[1] - 1):
            if labels[example, place + 1] != -100:
                p, q = (scores[example, place].double().softmax(0) for scores in (teacher, student))
                total, count = total + (p * (p / q).log()).sum(), count + 1
    return total, count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_divergence_of_the_tokens_that_count(dtype):
    student, teacher = logits(0, dtype), logits(1, dtype)
    total, count = brute_force(student, teacher, labels())
    assert count == 2 * 5 - 2 - 1
    assert divergence(student, teacher, labels()).item() == pytest.approx(total.item() / count, rel=1e-5)
    assert divergence(student, teacher, labels(), 40).item() == pytest.approx(total.item() / 40, rel=1e-5)
    assert divergence(student, student, labels()).item() == 0


def test_its_gradient_pulls_the_students_predictions_to_the_teachers():
    """q - p, of the tokens that count, and 0 of others."""
    student, teacher = logits(0).requires_grad_(), logits(1)
    divergence(student, teacher, labels()).backward()
    counted = torch.nn.functional.pad(labels()[:, 1:] != -100, (0, 1))[..., None]
    expected = (student.softmax(-1) - teacher.softmax(-1)) * counted / counted.sum()
    torch.testing.assert_close(student.grad, expected.detach(), rtol=1e-4, atol=1e-6)


def test_a_teacher_is_frozen_and_has_no_dropout():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=11, attention_dropout=0.5, **sizes)).train()
    teacher = Teacher(model, 0.25)
    student = logits(0, torch.float32).requires_grad_()
    tokens = torch.randint(11, (2, 6))
    inputs = {"input_ids": tokens, "labels": tokens}
    losses = [teacher.blended(torch.tensor(2.0), student, inputs, None) for _ in range(2)]
    assert losses[0] == losses[1]
    losses[0].backward()
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    expected = 0.25 * divergence(student, model(tokens).logits, tokens) + 0.75 * 2.0
    torch.testing.assert_close(losses[0], expected)


# ---- in a run -------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tiny, tmp_path):
    """A run of a dense model, to begin with and to imitate; ``go(name, **changes)`` runs another that does."""
    assert main([tiny(optimizer="adamw", update_proj_gap=None, output_dir=str(tmp_path / "dense"))]) == 0
    dense = str(tmp_path / "dense")

    def go(name, **changes):
        keys = {"optimizer": "adamw", "update_proj_gap": None, "logging_steps": 1, "max_steps": 2}
        start = {"model": dense, "model_overrides": None, "output_dir": str(tmp_path / name)}
        return main([tiny(**keys | start | changes)]), tmp_path / name

    return dense, go


def losses_of(told):
    return [entry["loss"] for entry in told["history"] if "loss" in entry]


def test_a_run_that_imitates_itself_begins_without_a_loss_and_with_no_share_it_is_the_plain_run(saved, metrics):
    dense, go = saved
    assert go("own", teacher=dense, distill=1.0)[0] == 0
    own = metrics(go("again", teacher=dense, distill=0.5)[1])
    plain = go("plain")[1]
    assert losses_of(metrics(plain.parent / "own"))[0] == 0
    assert losses_of(own)[0] == pytest.approx(losses_of(metrics(plain))[0] / 2, rel=1e-5)
    none = go("none", teacher=dense, distill=0.0)[1]
    assert same(weights(none), weights(plain))
    assert metrics(none)["history"] == metrics(plain)["history"]


def test_evaluation_knows_no_teacher_and_passes_of_a_step_count_as_one(saved, metrics, tmp_path):
    """The same batches in one pass and in four; the teacher is another model than the student."""
    dense, go = saved
    other = {"model": "2m", "learning_rate": 1e-3, "teacher": dense, "distill": 0.5, "tokenizer": dense}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    other["model_overrides"] = {**sizes, "vocab_size": 400}
    told = {}
    for passes in (1, 4):
        batch = {"per_device_train_batch_size": 8 // passes, "gradient_accumulation_steps": passes}
        code, run = go(f"in{passes}", **other, **batch)
        assert code == 0
        told[passes] = metrics(run)
    assert losses_of(told[4]) == pytest.approx(losses_of(told[1]), rel=1e-4)
    again = metrics(go("again", model=str(tmp_path / "in1"), max_steps=1, learning_rate=0.0)[1])
    assert again["validation_loss"] == pytest.approx(told[1]["validation_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "nowhere/at/all"}, "teacher 'nowhere/at/all' does not exist; "),
        ({"distill": 1.5}, "distill must be a number in [0, 1], got 1.5"),
    ],
)
def test_bad_input_gets_one_line(changes, message, tiny, tmp_path, capsys):
    assert main([tiny(**changes)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"gracile pretrain: {message}"), told
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_teacher_with_another_vocabulary_is_refused(tiny, tmp_path, capsys):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes)).save_pretrained(tmp_path / "other")
    assert main([tiny(teacher=str(tmp_path / "other"))]) == 2
    assert "has a vocabulary of 11 tokens, the model one of 400" in capsys.readouterr().err
