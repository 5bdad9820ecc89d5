"""KTO: its reference is the base, and zero is the divergence estimated from mismatched answers."""

import math
from types import SimpleNamespace

import pytest
import torch
from paired import CONFIG, alone, answers_in, strategy_of, trainer_of

from lightning_peft.errors import ConfigError
from lightning_peft.plugin.namespace import ROOTS, bind_to_lightning
from lightning_peft.tasks.reference import reference
from lightning_peft.tasks.unpaired import UnpairedPreferenceTuning


def task_of(**options):
    given = {"config": CONFIG, "learning_rate": 1e-2, "weight_decay": 0.0, **options}
    return bind_to_lightning(UnpairedPreferenceTuning, ROOTS[1])("none", **given)


@pytest.mark.parametrize(
    ("kind", "loss_type"),
    [
        ("lora and trained layers", "kto"),
        ("lora and trained layers", "apo_zero_unpaired"),
        pytest.param("qlora", "kto", marks=pytest.mark.long),
    ],
)
def test_loss_and_gradient_are_those_of_single_rows(kind, loss_type, tmp_path):
    data = answers_in(tmp_path)
    task = task_of(loss_type=loss_type, desirable_weight=1.5, undesirable_weight=0.75)
    trainer_of(strategy_of(kind, gradient_checkpointing=True)).fit(task, data)
    batch = next(iter(data.val_dataloader()))
    task.eval()
    with torch.no_grad(), reference(task):
        expected, expected_kl = alone(task.model, batch), alone(task.model, batch, "kl_")
    policy = alone(task.model, batch)
    kl = (alone(task.model, batch, "kl_").detach() - expected_kl).mean().clamp(min=0)
    kl = kl if loss_type == "kto" else torch.zeros(())
    gains = torch.where(batch["desirable"], policy - expected - kl, kl - policy + expected)
    weights = torch.where(batch["desirable"], 1.5, 0.75)
    loss = (weights * (1 - torch.sigmoid(0.1 * gains))).mean()
    task.zero_grad()
    loss.backward()
    grads = {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}
    task.zero_grad()
    measured = task.measure(batch)
    measured["loss"].mean().backward()
    assert batch["desirable"].unique().tolist() == [False, True]
    assert measured["kl"][0].item() == pytest.approx(kl.item(), abs=1e-3)
    torch.testing.assert_close(measured["loss"].mean(), loss, rtol=1e-4, atol=1e-5)
    assert grads
    for name, param in task.named_parameters():
        if param.grad is not None:
            torch.testing.assert_close(param.grad, grads[name], rtol=1e-3, atol=1e-4)


def test_the_estimate_is_over_rows_with_a_mismatched_answer_and_all_processes(tmp_path):
    data = answers_in(tmp_path)
    task = task_of(learning_rate=1.0)
    trainer = trainer_of(strategy_of("lora"))
    trainer.fit(task, data)
    batch = next(iter(data.val_dataloader()))
    task.eval()
    ratios = alone(task.model, batch, "kl_").detach()
    with torch.no_grad(), reference(task):
        ratios -= alone(task.model, batch, "kl_")
    assert ratios.abs().min() > 1e-3
    batch["kl_labels"][0] = -100
    other_process = ratios.abs().sum()
    task.trainer = SimpleNamespace(
        training=True, strategy=SimpleNamespace(reduce=lambda kl, *_: (kl + other_process) / 2)
    )
    found = task.measure(batch)["kl"][0].item()
    expected = (ratios[1:].mean() + other_process) / 2
    assert found == pytest.approx(expected.item(), abs=1e-3)


def test_a_run_that_diverged_logs_its_loss(tmp_path):
    data = answers_in(tmp_path)
    task = task_of()
    trainer = trainer_of(strategy_of("lora"))
    trainer.fit(task, data)
    with torch.no_grad():
        for param in task.parameters():
            if param.requires_grad:
                param.fill_(torch.nan)
    (found,) = trainer.validate(task, data, verbose=False)
    assert math.isnan(found["val_loss"])


def test_casts_of_the_estimate_leave_gradients_under_autocast(tmp_path):
    data = answers_in(tmp_path)
    task = task_of()
    trainer_of(strategy_of("lora")).fit(task, data)
    batch = next(iter(data.val_dataloader()))
    task.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        task.measure(batch)["loss"].mean().backward()
    trained = {n: p.grad for n, p in task.named_parameters() if p.requires_grad}
    assert trained
    assert all(grad is not None and grad.any() for grad in trained.values())


def test_it_learns_and_logs_what_it_says(tmp_path):
    data = answers_in(tmp_path, count=40, test_share=0.2)
    task = task_of()
    trainer = trainer_of(strategy_of("lora"), max_steps=30)
    trainer.validate(task, data, verbose=False)
    before = {name: value.item() for name, value in trainer.callback_metrics.items()}
    trainer.fit(task, data)
    trainer.validate(task, data, verbose=False)
    after = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert before.keys() == {
        f"val_{name}"
        for name in ("loss", "accuracy", "kl", "margin", "desirable_reward", "undesirable_reward")
    }
    assert before["val_loss"] == pytest.approx(0.5)
    assert before["val_accuracy"] == before["val_kl"] == before["val_margin"] == 0
    assert after["val_loss"] < 0.4
    assert after["val_accuracy"] > 0.8
    assert after["val_margin"] == pytest.approx(
        after["val_desirable_reward"] - after["val_undesirable_reward"]
    )
    rows = [row for batch in trainer.predict(task, datamodule=data) for row in batch]
    assert rows[0].keys() == {"desirable", "loss", "accuracy", "reward", "kl"}
    wanted = [row["reward"] for row in rows if row["desirable"]]
    assert min(wanted) > max(row["reward"] for row in rows if not row["desirable"])
    (sample,) = task.generate_samples([data.read().splits["validation"][0]], 4)
    assert sample.expected.startswith(("It is", "[undesirable] No idea"))


def test_a_batch_of_one_row_cannot_estimate(tmp_path):
    trainer = trainer_of(strategy_of("lora"))
    with pytest.raises(ConfigError, match="batch_size=1 leaves no other answer in a batch"):
        trainer.fit(task_of(), answers_in(tmp_path, batch_size=1))
    assert trainer.global_step == 0
    trainer_of(strategy_of("lora"), max_steps=1).fit(
        task_of(loss_type="apo_zero_unpaired"), answers_in(tmp_path, batch_size=1)
    )


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_without_adapters_there_is_no_reference(stage, tmp_path):
    with pytest.raises(ConfigError, match=r"loss_type='kto'\) needs adapters: its reference is"):
        getattr(trainer_of(), stage)(task_of(), datamodule=answers_in(tmp_path))


@pytest.mark.parametrize(
    ("weights", "advice"),
    [
        ((1.0, 1.0), "desirable_weight to 0.25 to 0.33, or undesirable_weight to 3.01 to 4.00,"),
        ((0.3, 1.0), None),
        ((1.0, 3.5), None),
        ((1.0, 2.0), "desirable_weight to 0.50 to 0.67, or undesirable_weight to 3.01 to 4.00,"),
    ],
)
def test_weights_of_labels_that_are_not_balanced(weights, advice):
    task = task_of(desirable_weight=weights[0], undesirable_weight=weights[1])
    found = task.balance_advice(400, 100)
    assert (found is None) == (advice is None)
    assert advice is None or advice in found
    assert task_of().balance_advice(100, 100) is None


def test_the_advice_is_logged_before_training(tmp_path, caplog):
    data = answers_in(tmp_path, wanted=lambda i: i % 4 == 0)
    trainer_of(strategy_of("lora"), max_steps=1).fit(task_of(), data)
    assert "training rows are desirable and" in caplog.text


@pytest.mark.parametrize(
    "options",
    [{"loss_type": "dpo"}, {"beta": 0}, {"desirable_weight": 0}, {"undesirable_weight": -1}],
)
def test_arguments_that_cannot_work(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        task_of(**options)
