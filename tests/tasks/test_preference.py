"""Preference tuning: its reference is the base, bit for bit, and no second model is in memory."""

import gc

import pytest
import torch
from paired import CONFIG, SETTINGS, alone, data_in, strategy_of, trainer_of
from peft import PeftModel
from transformers import LlamaForCausalLM

import lightning_peft
from lightning_peft import LoRAStrategy
from lightning_peft.errors import ConfigError
from lightning_peft.plugin.namespace import ROOTS, bind_to_lightning
from lightning_peft.tasks.preference import PreferenceTuning
from lightning_peft.tasks.preference_losses import PAIR_LOSSES, dpo, simpo
from lightning_peft.tasks.reference import reference


def task_of(root=ROOTS[1], **options):
    given = {"config": CONFIG, "learning_rate": 1e-2, "weight_decay": 0.0, **options}
    return bind_to_lightning(PreferenceTuning, root)("none", **given)


def base_model():
    task = task_of()
    task.configure_model()
    return task.model.eval()


@pytest.mark.parametrize("root", ROOTS)
def test_the_loss_is_that_of_two_models(root, tmp_path):
    task, pairs = task_of(root), data_in(tmp_path, root)
    trainer_of(strategy_of("lora"), root).fit(task, pairs)
    lightning_peft.save_adapter(task, tmp_path / "adapter")
    policy = PeftModel.from_pretrained(base_model(), tmp_path / "adapter").eval()
    batch = next(iter(pairs.val_dataloader()))
    with torch.no_grad():
        pi, ref = alone(policy, batch), alone(base_model(), batch)
    chosen, rejected = (0.1 * (pi - ref)).chunk(2)
    assert (chosen - rejected).abs().min() > 0.001
    task.eval()
    with torch.no_grad():
        found = task.compare(batch)
        predicted = task.predict_step(batch, 0)
    expected = -torch.log(torch.sigmoid(chosen - rejected))
    torch.testing.assert_close(found["loss"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["chosen_reward"], chosen, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found["rejected_reward"], rejected, rtol=1e-3, atol=1e-4)
    assert [row["margin"] for row in predicted] == found["margin"].tolist()


def test_each_type_of_loss_is_that_of_its_formula(tmp_path):
    task, pairs = task_of(), data_in(tmp_path)
    trainer_of(strategy_of("lora"), max_steps=1).fit(task, pairs)
    batch = next(iter(pairs.val_dataloader()))
    task.eval()
    losses = []
    with torch.no_grad():
        policy, tokens = task.answers(batch)
        expected = task.reference_answers(batch)
        for kind in PAIR_LOSSES:
            task.hparams.update(loss_type=kind, label_smoothing=0.1 if kind == "robust" else 0.0)
            found = task.compare(batch)["loss"]
            if kind == "simpo":
                made = simpo(policy, tokens, 0.1, 0.5)
            else:
                made = dpo(policy, expected, tokens, 0.1, kind, task.hparams["label_smoothing"])
            torch.testing.assert_close(found, made["loss"], rtol=1e-4, atol=1e-5)
            losses.append(round(found.mean().item(), 3))
    assert len(set(losses)) == len(PAIR_LOSSES)


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_reference_stays_the_base_and_only_adapters_move(kind, tmp_path):
    pairs = data_in(tmp_path)
    batch = next(iter(pairs.val_dataloader()))
    expected = _base_of(kind, tmp_path).answers(batch)[0]
    task = task_of()
    trainer = trainer_of(strategy_of(kind))
    trainer.fit(task, pairs)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    _check_reference(task, batch, expected)
    resumed = task_of()
    trainer_of(strategy_of(kind), max_steps=5).fit(resumed, pairs, ckpt_path=tmp_path / "one.ckpt")
    _check_reference(resumed, batch, expected)
    fresh = dict(_base_of(kind, tmp_path).named_parameters())
    saved = SETTINGS[kind][1].get("modules_to_save", [])
    for name, param in resumed.named_parameters():
        mine = "lora_" in name or any(part in name for part in saved)
        # A factor A is random in each run; what it has in common with others is that it trains.
        assert mine or torch.equal(param, fresh[name])
        assert param.requires_grad == mine


def _base_of(kind, tmp_path):
    """Returns a task whose adapters do nothing yet."""
    task = task_of()
    trainer_of(strategy_of(kind), max_steps=0).fit(task, data_in(tmp_path))
    return task.eval()


def _check_reference(task, batch, expected):
    task.train()
    modes = {name: module.training for name, module in task.named_modules()}
    with reference(task):
        assert torch.equal(task.answers(batch)[0], expected)
    assert modes == {name: module.training for name, module in task.named_modules()}
    task.eval()
    assert not torch.allclose(task.answers(batch)[0], expected, atol=0.1)


@pytest.mark.parametrize("kind", ["lora", "lora and trained layers", "qlora"])
def test_checkpointed_activations_are_computed_again_with_the_adapters(kind, tmp_path):
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(5)
        task = task_of()
        strategy = strategy_of(kind, gradient_checkpointing=checkpointing)
        grads = []

        def keep(module, optimizer, grads=grads):
            params = module.named_parameters()
            grads.append({n: p.grad.clone() for n, p in params if p.grad is not None})

        task.on_before_optimizer_step = keep.__get__(task)
        trainer_of(strategy, limit_val_batches=0).fit(task, data_in(tmp_path))
        found.append(grads)
    assert len(found[0]) == len(found[1]) == 3
    for without, with_ in zip(*found, strict=True):
        assert without.keys() == with_.keys() != set()
        assert all(torch.equal(without[name], with_[name]) for name in without)


@pytest.mark.parametrize("kind", ["lora", "lora and trained layers", "qlora"])
def test_gradients_are_those_of_two_models(kind, tmp_path):
    """Also under autocast, whose cached casts would mix the weights of policy and reference."""
    pairs = data_in(tmp_path)
    batch = next(iter(pairs.val_dataloader()))
    task = task_of()
    trainer_of(strategy_of(kind)).fit(task, pairs)
    other = task_of()
    trainer_of(strategy_of(kind), max_steps=0).fit(other, pairs)
    other.eval()
    task.eval()
    task.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        expected = other.answers(batch)[0].detach()
    with torch.autocast("cpu", torch.bfloat16):
        policy = task.answers(batch)[0]
        chosen, rejected = (0.1 * (policy - expected)).chunk(2)
        (-torch.nn.functional.logsigmoid(chosen - rejected)).mean().backward()
    grads = {name: p.grad for name, p in task.named_parameters() if p.requires_grad}
    task.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        task.compare(batch)["loss"].mean().backward()
    assert all(grad.any() for grad in grads.values())
    for name, param in task.named_parameters():
        if param.requires_grad:
            assert torch.equal(param.grad, grads[name])


def test_there_is_no_second_model(tmp_path):
    gc.collect()
    before = _models()
    task = task_of()
    trainer_of(strategy_of("lora")).fit(task, data_in(tmp_path))
    assert _models() == before + 1
    base = sum(p.numel() for p in base_model().parameters())
    adapters = sum(p.numel() for p in task.parameters() if p.requires_grad)
    assert sum(p.numel() for p in task.parameters()) == base + adapters
    assert adapters < base / 4


def _models():
    return sum(issubclass(type(one), LlamaForCausalLM) for one in gc.get_objects())


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_without_adapters_there_is_no_reference(stage, tmp_path):
    trainer = trainer_of()
    with pytest.raises(ConfigError, match="its reference is the base with the adapters off"):
        getattr(trainer, stage)(task_of(), datamodule=data_in(tmp_path, test_share=0.3))
    assert trainer.global_step == 0


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"init_lora_weights": "pissa"}, "moved a part of the weights of model into the adapters"),
        (
            {"adapt": "model.model.layers.0"},
            "tensors train that are not adapters, such as 'model.m",
        ),
    ],
)
def test_a_reference_that_is_not_the_base_is_refused(options, problem, tmp_path):
    trainer = trainer_of(LoRAStrategy(r=4, announce=False, **options))
    with pytest.raises(ConfigError, match=problem):
        trainer.fit(task_of(), data_in(tmp_path))
    assert trainer.global_step == 0


@pytest.mark.parametrize("fresh", [True, False])
def test_a_start_away_from_the_reference_is_reported(fresh, tmp_path, caplog):
    strategy = LoRAStrategy(r=4, announce=False, init_lora_weights=fresh, verify="full")
    trainer_of(strategy, max_steps=1).fit(task_of(), data_in(tmp_path))
    assert ("have learnt something already" in caplog.text) != fresh


def test_simpo_computes_no_reference_and_needs_no_adapters(tmp_path):
    pairs = data_in(tmp_path)
    task = task_of(loss_type="simpo", beta=2.0)
    task.configure_model()
    batch = next(iter(pairs.val_dataloader()))
    before = task.compare(batch)
    passes = []
    task.model.register_forward_hook(lambda *args: passes.append(1))
    trainer_of(max_steps=9, limit_val_batches=0).fit(task, pairs)
    assert len(passes) == 9
    after = task.compare(batch)
    assert after["loss"].mean() < before["loss"].mean()
    assert after["margin"].mean() > before["margin"].mean()


@pytest.mark.parametrize("strategy", ["auto", "lora", "qlora"])
def test_orpo_needs_no_reference(strategy, tmp_path):
    pairs = data_in(tmp_path)
    task = task_of(loss="orpo")
    trainer = trainer_of("auto" if strategy == "auto" else strategy_of(strategy), max_steps=20)
    trainer.validate(task, pairs, verbose=False)
    before = dict(trainer.callback_metrics)
    trainer.fit(task, pairs)
    trainer.validate(task, pairs, verbose=False)
    after = trainer.callback_metrics
    assert {f"val_{name}" for name in ("loss", "accuracy", "nll", "log_odds_ratio")} == set(before)
    assert after["val_loss"] < before["val_loss"]
    assert after["val_log_odds_ratio"] > before["val_log_odds_ratio"]


def test_metrics_are_means_over_pairs_whatever_the_batches(tmp_path):
    task = task_of()
    trainer = trainer_of(strategy_of("lora"), max_steps=8)
    trainer.fit(task, data_in(tmp_path))
    found = []
    for size in (1, 5):
        trainer.validate(task, data_in(tmp_path, batch_size=size), verbose=False)
        found.append({name: value.item() for name, value in trainer.callback_metrics.items()})
    validated = [name for name in found[0] if name.startswith("val_")]
    assert len(validated) == 5
    for name in validated:
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-4, abs=1e-5)
    rows = [
        row
        for batch in data_in(tmp_path, batch_size=3).val_dataloader()
        for row in task_rows(task, batch)
    ]
    share = sum(row["chosen_reward"] > row["rejected_reward"] for row in rows) / len(rows)
    assert found[0]["val_accuracy"] == pytest.approx(share)


def task_rows(task, batch):
    task.eval()
    with torch.no_grad():
        return task.predict_step(batch, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "kto"},
        {"beta": 0},
        {"label_smoothing": 0.5},
        {"loss": "orpo", "label_smoothing": 0.1},
        {"loss_type": "kto"},
        {"loss": "orpo", "loss_type": "ipo"},
        {"loss_type": "hinge", "label_smoothing": 0.1},
        {"loss_type": "robust"},
        {"loss_type": "simpo", "simpo_gamma": -0.1},
        {"simpo_gamma": 3.0},
        {"loss": "orpo", "simpo_gamma": 3.0},
    ],
)
def test_arguments_that_cannot_work(options):
    with pytest.raises(ConfigError, match=next(reversed(options))):
        task_of(**options)


def test_samples_are_answers_to_the_prompts_beside_the_chosen_ones(tmp_path):
    pairs = data_in(tmp_path)
    task = task_of()
    trainer_of(strategy_of("lora"), max_steps=1).fit(task, pairs)
    row = pairs.read().splits["validation"][0]
    (sample,) = task.generate_samples([row], 4)
    assert sample.expected.startswith("It is")
    assert "What is" in sample.prompt
    assert "It is" not in sample.prompt
