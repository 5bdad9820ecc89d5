"""Losses and gradients against TRL's own trainers, on the same weights and batches."""

import pytest
import torch
from datasets import Dataset
from paired import CONFIG, answers_in, data_in, prompts_in, strategy_of, trainer_of
from peft import PeftModel
from transformers import AutoTokenizer

import lightning_peft
from lightning_peft.data.unpaired import collate
from lightning_peft.demo.run import BASE
from lightning_peft.plugin.namespace import ROOTS, bind_to_lightning
from lightning_peft.tasks.grpo_losses import advantages_of
from lightning_peft.tasks.preference import PreferenceTuning
from lightning_peft.tasks.reward_tuning import RewardTuning
from lightning_peft.tasks.rollouts import Rollout
from lightning_peft.tasks.unpaired import UnpairedPreferenceTuning

# Importing TRL alone takes seconds.
pytestmark = pytest.mark.long
trl = pytest.importorskip("trl", reason="TRL is not installed, which needs Python 3.11")

PAIRS = [
    {"prompt": f"What is {i}?", "chosen": f" It is {i}.", "rejected": " No idea" * (1 + i)}
    for i in range(4)
]
SINGLE = [
    {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0}
    for i, row in enumerate(PAIRS)
]


DATA = {
    PreferenceTuning: data_in,
    UnpairedPreferenceTuning: answers_in,
    RewardTuning: prompts_in,
}


def made(cls, **options):
    task = bind_to_lightning(cls, ROOTS[1])("none", config=CONFIG, **options)
    task.configure_model()
    return task


def trained(cls, folder, **options):
    """Returns a task whose adapters are away from the base, TRL's model of it, and a batch."""
    task = bind_to_lightning(cls, ROOTS[1])("none", config=CONFIG, learning_rate=0.05, **options)
    data = DATA[cls](folder)
    trainer_of(strategy_of("lora")).fit(task, data)
    lightning_peft.save_adapter(task, folder / "adapter")
    base = made(cls, **options).model
    theirs = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    return task.eval(), theirs.eval(), next(iter(data.val_dataloader()))


def settings(folder, cls, **options):
    return cls(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        disable_dropout=True,
        **options,
    )


def tokenizer():
    found = AutoTokenizer.from_pretrained(BASE)
    found.pad_token = found.pad_token or found.eos_token
    return found


def compare(task, theirs, mine, loss):
    """Asserts that two losses and their gradients of the adapters are equal."""
    assert loss.item() == pytest.approx(mine.item(), rel=1e-5, abs=1e-5)
    task.zero_grad()
    theirs.zero_grad()
    mine.backward()
    loss.backward()
    found = {
        name.replace(".default", "").partition("layers.")[2]: param.grad
        for name, param in task.named_parameters()
        if param.requires_grad
    }
    others = {
        name.replace(".default", "").partition("layers.")[2]: param.grad
        for name, param in theirs.named_parameters()
        if param.grad is not None and ".ref." not in name
    }
    assert found.keys() == others.keys() != set()
    for name, grad in found.items():
        torch.testing.assert_close(grad, others[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("loss_type", "smoothing"),
    [("sigmoid", 0.0), ("hinge", 0.0), ("ipo", 0.0), ("robust", 0.1), ("apo_zero", 0.0)],
)
def test_dpo_and_its_relatives(loss_type, smoothing, tmp_path):
    options = {"beta": 0.3, "loss_type": loss_type, "label_smoothing": smoothing}
    task, theirs, batch = trained(PreferenceTuning, tmp_path, **options)
    trainer = trl.DPOTrainer(
        theirs,
        ref_model=made(PreferenceTuning).model,
        args=settings(tmp_path, trl.DPOConfig, **options),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer(),
    )
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    given["completion_mask"] = (batch["labels"] != -100).long()
    loss = trainer._compute_loss(trainer.model, given, return_outputs=False)
    compare(task, trainer.model, task.compare(batch)["loss"].mean(), loss)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto(loss_type, tmp_path):
    options = {"beta": 0.3, "loss_type": loss_type, "desirable_weight": 1.3}
    task, theirs, batch = trained(UnpairedPreferenceTuning, tmp_path, **options)
    trainer = trl.KTOTrainer(
        theirs,
        ref_model=made(UnpairedPreferenceTuning).model,
        args=settings(tmp_path, trl.KTOConfig, per_device_train_batch_size=4, **options),
        train_dataset=Dataset.from_list(SINGLE),
        processing_class=tokenizer(),
    )
    given = {"label": batch["desirable"]}
    for mine, prefix in (("", ""), ("kl_", "KL_")):
        for name in ("input_ids", "attention_mask"):
            given[f"{prefix}{name}"] = batch[f"{mine}{name}"]
        given[f"{prefix}completion_mask"] = (batch[f"{mine}labels"] != -100).long()
    loss = trainer._compute_loss(trainer.model, given, return_outputs=False)
    measured = task.measure(batch)
    if loss_type == "kto":
        kl = trainer._metrics["eval"]["kl"][-1]
        assert measured["kl"][0].item() == pytest.approx(kl, rel=1e-5, abs=1e-5)
    compare(task, trainer.model, measured["loss"].mean(), loss)


def test_mismatched_answers_are_those_of_trl(tmp_path):
    trainer = trl.KTOTrainer(
        made(UnpairedPreferenceTuning).model,
        ref_model=made(UnpairedPreferenceTuning).model,
        args=settings(tmp_path, trl.KTOConfig, per_device_train_batch_size=4),
        train_dataset=Dataset.from_list(SINGLE),
        processing_class=tokenizer(),
    )
    rows = list(trainer.train_dataset)
    theirs = trainer.data_collator(rows)
    mine = collate(
        [
            {
                "input_ids": row["prompt_ids"] + row["completion_ids"],
                "labels": [-100] * len(row["prompt_ids"]) + row["completion_ids"],
                "desirable": row["label"],
            }
            for row in rows
        ],
        tokenizer().pad_token_id,
        256,
    )
    assert torch.equal(mine["kl_input_ids"], theirs["KL_input_ids"])
    assert torch.equal((mine["kl_labels"] != -100).long(), theirs["KL_completion_mask"])
    assert torch.equal(mine["desirable"], theirs["label"])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo(smoothing, tmp_path):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    options = {"beta": 2.0, "simpo_gamma": 0.7, "label_smoothing": smoothing, "loss_type": "simpo"}
    task, theirs, batch = trained(PreferenceTuning, tmp_path, **options)
    trainer = CPOTrainer(
        theirs,
        args=settings(tmp_path, CPOConfig, cpo_alpha=0.0, **options),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer(),
    )
    logits = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logps = trainer.get_batch_logps(logits, batch["labels"], average_log_prob=True)
    losses, chosen, rejected = trainer.cpo_loss(*logps.chunk(2))
    measured = task.compare(batch)
    torch.testing.assert_close(measured["chosen_reward"], chosen, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(measured["rejected_reward"], rejected, rtol=1e-5, atol=1e-5)
    compare(task, theirs, measured["loss"].mean(), losses.mean())


def half(completion_ids, **rest):
    return [sum(token < 2048 for token in ids) / len(ids) for ids in completion_ids]


def short(completion_ids, **rest):
    return [None if ids[0] % 3 == 0 else 1 / len(ids) for ids in completion_ids]


SETTINGS = {
    "dapo": {"loss_type": "dapo"},
    "grpo": {"loss_type": "grpo", "scale_rewards": "batch", "temperature": 0.7},
    "bnpo": {"loss_type": "bnpo", "scale_rewards": "none", "epsilon_high": 0.3},
    "dr_grpo": {"loss_type": "dr_grpo", "mask_truncated_completions": True},
    "grpo with a reference": {"loss_type": "grpo", "beta": 0.2},
    "dapo with a reference": {"loss_type": "dapo", "beta": 0.2, "temperature": 1.3},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_grpo_on_the_same_samples(kind, tmp_path):
    """TRL samples and judges; both compute advantages and loss of that, also off policy."""
    options = {"beta": 0.0, **SETTINGS[kind], "num_generations": 4, "max_completion_length": 8}
    mine = {"rewards": ["test_trl_losses.half"], **options}
    task, theirs, _ = trained(RewardTuning, tmp_path, **mine)
    trainer = trl.GRPOTrainer(
        theirs,
        reward_funcs=[half, short],
        args=settings(
            tmp_path,
            trl.GRPOConfig,
            per_device_train_batch_size=8,
            reward_weights=[1.0, 0.5],
            **options,
        ),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in PAIRS]),
        processing_class=tokenizer(),
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.eval()
    trainer.num_generations_eval = 4
    rows = [{"prompt": PAIRS[i // 4]["prompt"]} for i in range(8)]
    given = trainer._generate_and_score_completions(rows)
    if options.get("mask_truncated_completions"):
        # None has ended; as if half of them had.
        given["completion_mask"][::2] = 1
    answers = [
        ids[: int(mask.sum())].tolist() if mask.any() else ids.tolist()
        for ids, mask in zip(given["completion_ids"], given["completion_mask"], strict=True)
    ]
    filler = tokenizer().pad_token_id
    answers = [[token for token in ids if token != filler] or ids for ids in answers]
    rewards = torch.tensor([half(answers), [torch.nan if r is None else r for r in short(answers)]])
    scale = options.get("scale_rewards", "group")
    found = advantages_of(rewards.T, torch.tensor([1.0, 0.5]), 4, scale)
    torch.testing.assert_close(found.values, given["advantages"], rtol=1e-5, atol=1e-5)
    assert found.values.abs().max() > 0.01

    prompt, answer = given["prompt_mask"].bool(), given["completion_mask"].bool()
    batch, places = _right_padded(given)
    mask = torch.zeros_like(batch["labels"][:, 1:], dtype=torch.bool)
    rollout = Rollout(batch, mask, given["advantages"], {})
    with torch.no_grad():
        policy = task.log_probabilities(batch)
    for row, first in enumerate(places):
        mask[row, first - 1 : first - 1 + answer.shape[1]] = answer[row]
    generator = torch.Generator().manual_seed(1)
    noise = 0.4 * torch.randn(answer.shape, generator=generator)
    rollout.old = policy.clone()
    if options["beta"]:
        rollout.reference = policy.clone()
    given["old_per_token_logps"] = torch.zeros(answer.shape)
    given["ref_per_token_logps"] = torch.zeros(answer.shape)
    for row, first in enumerate(places):
        span = slice(first - 1, first - 1 + answer.shape[1])
        width = policy[row, span].shape[0]
        rollout.old[row, span] += noise[row, :width]
        given["old_per_token_logps"][row, :width] = rollout.old[row, span]
        if options["beta"]:
            rollout.reference[row, span] -= noise[row, :width].flip(0)
            given["ref_per_token_logps"][row, :width] = rollout.reference[row, span]
    assert prompt.any()
    given["num_items_in_batch"] = answer.sum()
    loss = trainer._compute_loss(trainer.model, given)
    own, _, means = task.loss_of(rollout)
    clipped = trainer._metrics["eval"]["clip_ratio/region_mean"][-1]
    assert means["clipped"].item() == pytest.approx(clipped, abs=1e-6)
    assert clipped > 0
    if options["beta"]:
        kl = trainer._metrics["eval"]["kl"][-1]
        assert means["kl"].item() == pytest.approx(kl, rel=1e-5, abs=1e-5)
    compare(task, trainer.model, own, loss)


def _right_padded(given):
    """Returns TRL's samples as ours: padded on the right, and where each answer begins."""
    rows, places = [], []
    for ids, mask, answer in zip(
        given["prompt_ids"], given["prompt_mask"].bool(), given["completion_ids"], strict=True
    ):
        asked = ids[mask].tolist()
        places.append(len(asked))
        rows.append((asked, answer.tolist()))
    length = max(len(asked) + len(answer) for asked, answer in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": ids.clone(), "labels": ids - 100}
    for row, (asked, answer) in enumerate(rows):
        whole, count = torch.tensor(asked + answer), len(asked) + len(answer)
        batch["input_ids"][row, :count] = whole
        batch["attention_mask"][row, :count] = 1
        batch["labels"][row, len(asked) : count] = whole[len(asked) :]
    return batch, places
