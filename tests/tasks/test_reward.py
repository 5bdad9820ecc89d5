"""Reward models: the score is read where the answer ends, and the loss is the formula."""

from math import exp, log

import pytest
import torch
from paired import CONFIG, data_in, strategy_of, trainer_of
from transformers import LlamaConfig

from lightning_peft.errors import ConfigError
from lightning_peft.plugin.namespace import ROOTS, bind_to_lightning
from lightning_peft.tasks.reward import RewardModel, padding_token

END = 2


def task_of(root=ROOTS[1], config=None, **options):
    given = {"config": {**CONFIG, **(config or {})}, "learning_rate": 5e-3, **options}
    return bind_to_lightning(RewardModel, root)("none", **given)


def built(**options):
    task = task_of(**options)
    task.configure_model()
    return task.eval()


def batch_of(filler):
    rows = [[1, 9, 8, 7, END], [1, 9, END], [1, 9, 5, 5, 5, 6, END], [1, 9, 4, END]]
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [filler] * (longest - len(row)) for row in rows]),
        "attention_mask": torch.tensor(
            [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        ),
    }, rows


@pytest.mark.parametrize("filler", [0, END, 77])
@pytest.mark.parametrize("padding", [None, 0, END, 9])
def test_the_score_is_that_of_the_last_token(filler, padding):
    """Whatever pads, also the end token, which many tokenizers take for want of another."""
    task = built(config={"pad_token_id": padding, "bos_token_id": 1, "eos_token_id": END})
    batch, rows = batch_of(filler)
    with torch.no_grad():
        found = task.scores(batch)
        for score, row in zip(found, rows, strict=True):
            hidden = task.model.model(input_ids=torch.tensor([row])).last_hidden_state
            torch.testing.assert_close(score, task.model.score(hidden[0, -1])[0])


def test_an_answer_that_ends_with_the_padding_token_is_refused():
    task = built(config={"pad_token_id": 9})
    batch, _ = batch_of(0)
    batch["input_ids"][1, 2] = 9
    with pytest.raises(ConfigError, match="A row ends with token 9"):
        task.scores(batch)


@pytest.mark.parametrize(
    ("padding", "start", "ends", "expected"),
    [(5, 1, 2, 5), (2, 1, 2, 1), (None, 1, 2, 1), (None, 2, 2, 0), (None, None, [0, 1], 2)],
)
def test_the_padding_token_ends_no_answer(padding, start, ends, expected):
    config = LlamaConfig(pad_token_id=padding, bos_token_id=start, eos_token_id=ends)
    assert padding_token(config) == expected


@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_the_loss_is_the_formula(margin):
    task = built(margin=margin)
    batch, _ = batch_of(0)
    with torch.no_grad():
        scores = (10 * task.scores(batch)).tolist()
        task.model.score.weight.mul_(10)
        found = task.predict_step(batch, 0)
    assert len(found) == 2
    for pair, row in enumerate(found):
        chosen, rejected = scores[pair], scores[pair + 2]
        difference = chosen - rejected
        assert row["loss"] == pytest.approx(log(1 + exp(margin - difference)), rel=1e-4)
        assert row["margin"] == pytest.approx(difference, rel=1e-4)
        assert row["accuracy"] == float(chosen > rejected)
        assert (row["chosen_score"], row["rejected_score"]) == pytest.approx((chosen, rejected))


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_adapters_and_the_head_train_and_nothing_else(kind, tmp_path):
    task, fresh = task_of(), task_of()
    trainer_of(strategy_of(kind), max_steps=0).fit(fresh, data_in(tmp_path))
    trainer = trainer_of(strategy_of(kind), max_steps=20)
    trainer.fit(task, data_in(tmp_path))
    before = dict(fresh.named_parameters())
    for name, param in task.named_parameters():
        mine = "lora_" in name or name == "model.score.weight"
        assert param.requires_grad == mine
        assert torch.equal(param, before[name]) != mine
    trainer.validate(task, data_in(tmp_path), verbose=False)
    assert trainer.callback_metrics["val_accuracy"] == 1
    assert trainer.callback_metrics["val_loss"] < log(2)
    predicted = trainer.predict(task, data_in(tmp_path))
    assert all(row["margin"] > 0 for batch in predicted for row in batch)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_the_head_of_a_base_in_16_bits_is_not(precision, tmp_path):
    fresh = built()
    fresh.model.model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    task = bind_to_lightning(RewardModel, ROOTS[1])(str(tmp_path / "base"), learning_rate=1e-5)
    strategy = strategy_of("lora", verify="full")
    trainer = trainer_of(strategy, precision=precision)
    trainer.fit(task, data_in(tmp_path))
    assert task.model.score.weight.dtype == torch.float32
    assert task.model.model.embed_tokens.weight.dtype == torch.bfloat16
    trainer.validate(task, data_in(tmp_path), verbose=False)
    assert torch.isfinite(trainer.callback_metrics["val_loss"])


def test_arguments_that_cannot_work():
    with pytest.raises(ConfigError, match="margin=-1 is less than 0"):
        task_of(margin=-1)
