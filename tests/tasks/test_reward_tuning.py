"""GRPO: what is sampled, by which model, and that runs are reproducible."""

import sys

import pytest
import torch
from paired import CONFIG, alone, answers_in, prompts_in, strategy_of, trainer_of

from lightning_peft.errors import ConfigError, UnsupportedError
from lightning_peft.plan.batch_size import BatchSize, size_of
from lightning_peft.plugin.namespace import ROOTS, bind_to_lightning
from lightning_peft.tasks.reference import reference
from lightning_peft.tasks.reward_tuning import RewardTuning

SMALL = {"num_generations": 4, "max_completion_length": 6, "rewards": ["own_rewards.low"]}
OWN = '''
def low(completion_ids, **rest):
    """Prefers tokens of the first half of the vocabulary."""
    return [sum(token < 2048 for token in ids) / len(ids) for ids in completion_ids]

def flat(completions):
    return [0.5 for _ in completions]

def needs(completions, gold):
    return [0.0 for _ in completions]
'''


@pytest.fixture(autouse=True)
def own_rewards(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_rewards", None)


def task_of(**options):
    given = {"config": CONFIG, "learning_rate": 2e-2, "weight_decay": 0.0, **SMALL, **options}
    return bind_to_lightning(RewardTuning, ROOTS[1])("none", **given)


def trained(folder, kind="lora", **options):
    """Returns a task that took a few steps, and a batch of its data."""
    task, data = task_of(**options), prompts_in(folder)
    trainer_of(strategy_of(kind), limit_val_batches=0).fit(task, data)
    return task, next(iter(data.val_dataloader()))


@pytest.mark.parametrize(
    "kind", ["lora with dropout", pytest.param("qlora", marks=pytest.mark.long)]
)
def test_samples_are_those_of_the_tuned_model_without_dropout(kind, tmp_path):
    task, batch = trained(tmp_path, kind, temperature=0.8, beta=0.1)
    task.train()
    state = torch.get_rng_state()
    rollout = task.roll_out(batch)
    assert torch.equal(state, torch.get_rng_state())
    assert task.model.training
    again = task.roll_out(batch)
    assert torch.equal(rollout.batch["input_ids"], again.batch["input_ids"])
    other = task.roll_out(batch, batch_idx=1)
    assert rollout.batch["input_ids"].tolist() != other.batch["input_ids"].tolist()
    # By hand: row by row, on the base and with the adapters, at the temperature.
    task.eval()
    with torch.no_grad():
        policy = task.log_probabilities(rollout.batch).sum(1)
        assert len(policy) == 8
        logits = task.model.lm_head
        scaled = logits.register_forward_hook(lambda *args: args[2] / 0.8)
        expected = alone(task.model, rollout.batch)
        with reference(task):
            base = alone(task.model, rollout.batch)
        scaled.remove()
    torch.testing.assert_close(policy, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rollout.reference.sum(1), base, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, base, atol=0.01)


def test_a_run_logs_what_it_says_and_is_reproducible(tmp_path):
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        task, data = task_of(beta=0.05, num_iterations=2, epsilon=0.01), prompts_in(tmp_path)
        trainer = trainer_of(strategy_of("lora"), limit_val_batches=1)
        trainer.fit(task, data)
        logged = dict(trainer.callback_metrics)
        trainer.validate(task, data, verbose=False)
        logged |= trainer.callback_metrics
        weights = [p.detach().clone() for p in task.parameters() if p.requires_grad]
        found.append((logged, weights))
    logged = {name: value.item() for name, value in found[0][0].items()}
    names = ("loss", "reward", "reward_std", "reward_low", "equal_groups", "cut", "tokens", "kl")
    assert logged.keys() >= {f"train_{name}" for name in (*names, "clipped")}
    assert logged["val_loss"] == -logged["val_reward"] == -logged["val_reward_low"]
    assert logged["train_tokens"] <= 6
    # The second step with the same samples is away from the model that sampled them.
    assert logged["train_clipped"] > 0
    assert logged["train_kl"] > 0
    assert found[0][0] == found[1][0]
    assert all(torch.equal(*both) for both in zip(found[0][1], found[1][1], strict=True))


def test_its_memory_is_that_of_prompts_with_answers():
    ids = torch.zeros(3, 5, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": ids, "rows": [{"prompt": "a"}] * 3}
    assert size_of(task_of(), batch) == BatchSize(integers=3 * 4 * (5 + 6), longest=12)


def test_groups_of_equal_rewards_move_nothing(tmp_path):
    task = task_of(rewards=["own_rewards.flat"])
    trainer = trainer_of(strategy_of("lora"), max_steps=1, limit_val_batches=0)
    trainer.fit(task, prompts_in(tmp_path))
    assert trainer.callback_metrics["train_equal_groups"] == 1
    assert trainer.callback_metrics["train_loss"] == 0
    assert not any(p.any() for name, p in task.named_parameters() if "lora_B" in name)


def test_answers_without_an_end_are_left_out_of_the_loss(tmp_path):
    task, batch = trained(tmp_path, mask_truncated_completions=True)
    task.eval()
    rollout = task.roll_out(batch)
    ended = (rollout.batch["labels"] == task.trainer.datamodule.tokenizer.eos_token_id).any(1)
    assert torch.equal(rollout.mask.any(1), ended)
    assert rollout.measured["cut"].item() == pytest.approx(1 - ended.float().mean().item())


@pytest.mark.long
@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_the_reward_rises(kind, tmp_path):
    task = task_of(num_generations=8, learning_rate=3e-3)
    data = prompts_in(tmp_path, count=24)
    trainer = trainer_of(strategy_of(kind), max_steps=25)
    trainer.validate(task, data, verbose=False)
    before = trainer.callback_metrics["val_reward"].item()
    trainer.fit(task, data)
    trainer.validate(task, data, verbose=False)
    assert trainer.callback_metrics["val_reward"].item() > before + 0.1
    rows = [row for batch in trainer.predict(task, datamodule=data) for row in batch]
    assert rows[0].keys() == {"prompt", "generated", "reward", "reward_low"}


@pytest.mark.long
def test_a_resumed_run_is_the_same(tmp_path):
    found = []
    for stops in ([4], [2, 4]):
        path = None
        for stop in stops:
            torch.manual_seed(5)
            task = task_of(schedule="constant", warmup=0.0)
            trainer = trainer_of(strategy_of("lora"), max_steps=stop, limit_val_batches=0)
            trainer.fit(task, prompts_in(tmp_path, validation_share=0), ckpt_path=path)
            path = tmp_path / "run.ckpt"
            trainer.save_checkpoint(path)
        found.append([p.detach().clone() for p in task.parameters() if p.requires_grad])
    assert all(torch.equal(*both) for both in zip(*found, strict=True))


def test_what_is_not_supported_is_refused_before_a_sample(tmp_path):
    task = task_of()
    with pytest.raises(ConfigError, match="takes prompts from PromptData, not from Unpaired"):
        trainer_of(strategy_of("lora")).fit(task, answers_in(tmp_path))
    with pytest.raises(ConfigError, match=r"RewardTuning\(beta=0.1\) needs adapters"):
        trainer_of().fit(task_of(beta=0.1), prompts_in(tmp_path))
    with pytest.raises(ConfigError, match="'own_rewards.absent' cannot be imported"):
        trainer_of().fit(task_of(rewards=["own_rewards.absent"]), prompts_in(tmp_path))
    for start in ("fit", "validate"):
        task, data = task_of(rewards=["own_rewards.needs"]), prompts_in(tmp_path)
        with pytest.raises(ConfigError, match="'own_rewards.needs' needs gold, and no row has"):
            getattr(trainer_of(), start)(task, datamodule=data)
    with pytest.raises(ConfigError, match=r"max_completion_length=2,048: 'none' takes 2,048 tog"):
        trainer_of().fit(task_of(max_completion_length=2048), prompts_in(tmp_path))
    repeated = task_of(num_iterations=2)
    with pytest.raises(ConfigError, match="accumulate_grad_batches=2 makes one step of several"):
        trainer_of(accumulate_grad_batches=2).fit(repeated, prompts_in(tmp_path))


def test_several_processes_are_refused():
    from pytorch_lightning import Trainer

    task = task_of()
    quiet = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    task.trainer = Trainer(devices=2, strategy="ddp", **quiet)
    with pytest.raises(UnsupportedError, match="trains in one process, and there are 2"):
        task.on_fit_start()


@pytest.mark.parametrize(
    "options",
    [
        {"rewards": []},
        {"rewards": ["a.b", "a.b"]},
        {"rewards": ["a.score", "b.score"]},
        {"rewards": ["a.std"]},
        {"reward_weights": [1.0, 2.0]},
        {"num_generations": 1},
        {"num_iterations": 0},
        {"temperature": 0},
        {"top_p": 0},
        {"epsilon_high": 0},
        {"beta": -1},
        {"loss_type": "ppo"},
        {"scale_rewards": "all"},
    ],
)
def test_arguments_that_cannot_work(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        task_of(**options)
