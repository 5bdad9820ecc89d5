"""Training on rewards: group relative policy optimization (GRPO)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from lightning_peft.compat.lightning import trainer_of
from lightning_peft.data.prompt_rows import PromptData
from lightning_peft.errors import ConfigError, UnsupportedError
from lightning_peft.tasks.grpo_losses import (
    GROUP_LOSSES,
    SCALINGS,
    GroupLoss,
    Scaling,
    advantages_of,
    averaged,
    grpo,
)
from lightning_peft.tasks.preference_losses import token_log_probabilities
from lightning_peft.tasks.reference import ReferencedTask, reference
from lightning_peft.tasks.reward_functions import (
    RewardFunction,
    check_columns,
    judge,
    load_rewards,
)
from lightning_peft.tasks.rollouts import Rollout, Sampling, answers_to
from lightning_peft.tasks.samples import GeneratedSample

# Sets the seeds of steps apart.
_PRIME = 1_000_003


class RewardTuning(ReferencedTask):
    """A causal language model that learns from rewards of the answers that it samples.

    Group relative policy optimization (GRPO, arXiv 2402.03300): in each step the model answers
    every prompt of the batch ``num_generations`` times, functions judge the answers, and those
    better than the mean of their group become more likely. Its losses are TRL's.

    Logs ``train_loss``, ``train_reward`` (mean weighted reward of the samples),
    ``train_reward_NAME`` of each function, ``train_reward_std`` (within groups),
    ``train_equal_groups`` (share of groups whose rewards are all equal, which teach nothing),
    ``train_cut`` (share of answers that did not end), ``train_tokens`` (mean length),
    ``train_clipped`` (share of tokens), and with ``beta`` ``train_kl``. Validation answers greedily
    and logs ``val_reward`` and ``val_reward_NAME``, means over rows, and ``val_loss``, which is
    minus ``val_reward``; the same as ``test_...``.

    Args:
        model: Name on the hub, or folder, of a transformers model.
        rewards: Reward functions, by import path (``my_rewards.length``), or ``"json_exactness"``,
            which compares with the column ``expected``. A function is called with lists:
            ``prompts``, ``completions``, ``completion_ids`` and the columns of the rows by name. It
            returns a number for each answer, or ``None`` where it does not judge one.
        reward_weights: Weight of each function; 1 by default.
        num_generations: Answers to each prompt; 2 or more.
        max_completion_length: Most tokens of an answer.
        temperature: Of sampling; the loss is that of the distribution at this temperature.
        top_p: Share of the probability that tokens are drawn from.
        beta: Weight of the divergence from the reference, the same base with the adapters off; with
            0 there is none, and adapters are not needed.
        epsilon: How far the ratio of new and old probability may fall below 1 before it is clipped.
        epsilon_high: How far it may rise above 1; ``epsilon`` by default.
        num_iterations: Optimizer steps for each batch of samples. All count as one step of the
            Trainer.
        loss_type: ``"dapo"`` (mean over the tokens of a step), ``"grpo"`` (over samples),
            ``"bnpo"`` (over the tokens of a batch) or ``"dr_grpo"`` (over the most tokens that
            there might be).
        scale_rewards: What advantages are divided by: the standard deviation of the ``"group"``, of
            the ``"batch"``, or ``"none"``.
        mask_truncated_completions: Leave answers out of the loss that did not end.
        sampling_seed: Another seed samples other answers.
        learning_rate: Peak learning rate of AdamW. The default is ten times TRL's for full
            fine-tuning.
        **options: Keyword arguments of :class:`PretrainedTask
            <lightning_peft.tasks.pretrained.PretrainedTask>`.

    Raises:
        ConfigError: If arguments contradict each other.
    """

    couples_rows = True
    positive = (*ReferencedTask.positive, "temperature", "epsilon", "epsilon_high")
    least = {"num_generations": 2, "num_iterations": 1, "max_completion_length": 1, "beta": 0}

    def __init__(
        self,
        model: str,
        rewards: list[str],
        reward_weights: list[float] | None = None,
        num_generations: int = 8,
        max_completion_length: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        beta: float = 0.0,
        epsilon: float = 0.2,
        epsilon_high: float | None = None,
        num_iterations: int = 1,
        loss_type: GroupLoss = "dapo",
        scale_rewards: Scaling = "group",
        mask_truncated_completions: bool = False,
        sampling_seed: int = 0,
        learning_rate: float = 1e-5,
        **options: Any,
    ) -> None:
        super().__init__(model, learning_rate, **options)
        self._functions: dict[str, RewardFunction] | None = None
        # Which of the steps with the same samples this is, and what they were sampled with.
        self._iteration = 0
        self._rollout: Rollout | None = None
        # The data whose rows were checked.
        self._checked: object = None

    def _argument_problems(self) -> list[str]:
        hparams = self.hparams
        problems = super()._argument_problems()
        rewards, weights = hparams["rewards"], hparams["reward_weights"]
        if not rewards or len({*rewards}) < len(rewards):
            problems.append(f"rewards={rewards!r} is to name one function or more, each once")
        short = [_short(path) for path in rewards]
        for name, count in Counter(short).items():
            if count > 1 and len({*rewards}) == len(rewards):
                problems.append(
                    f"rewards={rewards!r} would log several as reward_{name}: rename one"
                )
        if "std" in short:
            problems.append(
                f"rewards={rewards!r} has a function std, and reward_std is logged of all"
            )
        if weights is not None and len(weights) != len(rewards):
            problems.append(f"reward_weights={weights!r} is not one number for each of {rewards!r}")
        if not 0 < hparams["top_p"] <= 1:
            problems.append(f"top_p={hparams['top_p']} is not above 0 and at most 1")
        for name, known in (("loss_type", GROUP_LOSSES), ("scale_rewards", SCALINGS)):
            if hparams[name] not in known:
                named = ", ".join(map(repr, known))
                problems.append(f"{name}={hparams[name]!r} is none of {named}")
        return problems

    @property
    def has_reference(self) -> bool:
        """Whether the loss needs a reference."""
        return bool(self.hparams["beta"])

    @property
    def title(self) -> str:
        """The class and its loss, for messages."""
        return f"{type(self).__name__}(beta={self.hparams['beta']})"

    @property
    def functions(self) -> dict[str, RewardFunction]:
        """The reward functions by their paths, imported on first use."""
        if self._functions is None:
            self._functions = load_rewards(self.hparams["rewards"])
        return self._functions

    def make_metrics(self) -> dict[str, Any]:
        """Returns means over rows: of the reward, and by function."""
        names = [f"reward_{_short(path)}" for path in self.hparams["rewards"]]
        return {name: MeanMetric() for name in ("reward", *names)}

    def on_fit_start(self) -> None:
        """Checks processes, steps and rows, and puts the model in train mode."""
        trainer: Any = self.trainer
        if trainer.world_size > 1:
            raise UnsupportedError(
                f"{type(self).__name__} trains in one process, and there are {trainer.world_size}. "
                "Its groups and their rewards have not been tested across processes. Set devices=1."
            )
        if self.hparams["num_iterations"] > 1 and trainer.accumulate_grad_batches > 1:
            raise ConfigError(
                f"num_iterations={self.hparams['num_iterations']} repeats the steps of one batch, "
                f"and accumulate_grad_batches={trainer.accumulate_grad_batches} makes one step of "
                "several. Set one of them to 1, and batch_size to the prompts of a step."
            )
        self._check_rows()
        super().on_fit_start()

    def _check_rows(self) -> None:
        data = self._datamodule
        if not isinstance(data, PromptData):
            raise ConfigError(
                f"{type(self).__name__} takes prompts from PromptData, not from "
                f"{type(data).__name__}: answers are sampled, not read."
            )
        if self._checked is data:
            return
        # So that a path or a row that is wrong is known before the first answer.
        check_columns(self.functions, data.judged_rows())
        self._check_lengths(data)
        self._checked = data

    def _check_lengths(self, data: PromptData) -> None:
        assert self.model is not None
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 0
        prompt = max(max(rows["length"]) for rows in data.read().splits.values())
        answer = self.hparams["max_completion_length"]
        if 0 < limit < prompt + answer:
            raise ConfigError(
                f"The longest prompt has {prompt:,} tokens, and an answer may have "
                f"max_completion_length={answer:,}: {self.hparams['model']!r} takes {limit:,} "
                "together. Lower it, or take shorter prompts: max_length= of the data names each "
                "that is longer."
            )

    def on_validation_start(self) -> None:
        """Checks that there is a reference, rewards and prompts."""
        super().on_validation_start()
        self._check_rows()

    on_test_start = on_predict_start = on_validation_start

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Begins with new samples."""
        self._iteration, self._rollout = 0, None

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Steps ``num_iterations`` times with the samples of this batch."""
        for iteration in range(self.hparams["num_iterations"]):
            self._iteration = iteration
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def activation_shapes(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Returns the largest batch that learns from ``batch``, for plans of memory."""
        rows, length = batch["input_ids"].shape
        answers = rows * self.hparams["num_generations"]
        longest = length + self.hparams["max_completion_length"]
        return {"input_ids": torch.empty(answers, longest, dtype=torch.long, device="meta")}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Returns the loss of the samples of ``batch``, which are drawn in its first iteration."""
        if self._iteration == 0 or self._rollout is None:
            self._rollout = self.roll_out(batch, batch_idx)
        rollout, hparams = self._rollout, self.hparams
        loss, items, means = self.loss_of(rollout)
        rows = len(rollout.mask)
        self.log_training(batch_idx, {"loss": loss}, loss.new_tensor(items), rows)
        if self._iteration == hparams["num_iterations"] - 1:
            for name, value in {**rollout.measured, **means}.items():
                self.log(f"train_{name}", value, on_step=True, on_epoch=False, batch_size=rows)
        return loss

    def roll_out(self, batch: dict[str, Any], batch_idx: int = 0) -> Rollout:
        """Returns sampled answers to the prompts of ``batch``, their rewards and advantages."""
        hparams = self.hparams
        size = hparams["num_generations"]
        trainer = trainer_of(self)
        step = 0 if trainer is None else trainer.global_step
        # Not from the generator that dropout draws from: a resumed run samples the same answers.
        seed = ((hparams["sampling_seed"] * _PRIME + step) * _PRIME + batch_idx) % 2**63
        sampling = Sampling(
            hparams["max_completion_length"], size, hparams["temperature"], hparams["top_p"], seed
        )
        answers = answers_to(self, batch, sampling)
        rows = [row for row in batch["rows"] for _ in range(size)]
        rewards = judge(self.functions, rows, answers.completions(rows), answers.tokens)
        weights = torch.tensor(hparams["reward_weights"] or [1.0] * rewards.shape[1])
        found = advantages_of(rewards, weights, size, hparams["scale_rewards"])
        mask = answers.mask
        if hparams["mask_truncated_completions"]:
            mask = mask & ~answers.cut[:, None]
        groups = found.rewards.view(-1, size)
        measured = {
            "reward": found.rewards.nanmean(),
            "reward_std": groups.std(1).nanmean(),
            "equal_groups": found.equal.float().mean(),
            "cut": answers.cut.float().mean(),
            "tokens": answers.mask.sum(1).float().mean(),
            **{
                f"reward_{_short(path)}": one.nanmean()
                for path, one in zip(self.functions, rewards.T, strict=True)
            },
        }
        rollout = Rollout(answers.batch, mask, found.values.to(mask.device), measured)
        if self.has_reference:
            with reference(self):
                rollout.reference = self.log_probabilities(rollout.batch)
        return rollout

    def log_probabilities(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns those of the sampled tokens, ``(samples, length - 1)``, 0 for others."""
        output = self(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        temperature = self.hparams["temperature"]
        return token_log_probabilities(output.logits, batch["labels"], temperature)[0]

    def loss_of(self, rollout: Rollout) -> tuple[Tensor, int, dict[str, Tensor]]:
        """Returns the loss of samples, of how many items it is the mean, and what is logged."""
        hparams = self.hparams
        policy = self.log_probabilities(rollout.batch)
        if rollout.old is None:
            # The model has not moved since it sampled.
            rollout.old = policy.detach()
        high = hparams["epsilon_high"]
        clip = (hparams["epsilon"], hparams["epsilon"] if high is None else high)
        by_token, divergence, clipped = grpo(
            policy,
            rollout.old,
            rollout.mask,
            rollout.advantages,
            clip,
            rollout.reference,
            hparams["beta"],
        )
        loss, items = averaged(
            by_token, rollout.mask, hparams["loss_type"], hparams["max_completion_length"]
        )
        tokens = rollout.mask.sum().clamp(min=1)
        means = {"clipped": clipped.sum() / tokens}
        if self.has_reference:
            means["kl"] = divergence.detach().sum() / tokens
        return loss, items, means

    def evaluate(self, batch: dict[str, Any]) -> None:
        """Adds the rewards of greedy answers to the prompts of ``batch``."""
        rewards, total, _ = self._greedy(batch)
        self.metrics["reward"].update(total[~total.isnan()])
        for path, values in zip(self.functions, rewards.T, strict=True):
            self.metrics[f"reward_{_short(path)}"].update(values[~values.isnan()])

    def _greedy(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, list[Any]]:
        answers = answers_to(self, batch, Sampling(self.hparams["max_completion_length"]))
        completions = answers.completions(batch["rows"])
        rewards = judge(self.functions, batch["rows"], completions, answers.tokens)
        weights = torch.tensor(self.hparams["reward_weights"] or [1.0] * rewards.shape[1])
        return rewards, advantages_of(rewards, weights, 1, "none").rewards, completions

    def results(self) -> dict[str, Any]:
        """Returns the mean rewards, and minus their sum as ``loss``."""
        found = super().results()
        return {"loss": -found["reward"], **found}

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Returns prompt, answer and rewards of each row."""
        rewards, total, completions = self._greedy(batch)
        names = [f"reward_{_short(path)}" for path in self.functions]
        return [
            {
                "prompt": row["prompt"],
                "generated": completion,
                "reward": one,
                **dict(zip(names, each, strict=True)),
            }
            for row, completion, one, each in zip(
                batch["rows"], completions, total.tolist(), rewards.tolist(), strict=True
            )
        ]

    def generate_samples(
        self, rows: list[dict[str, Any]], max_new_tokens: int
    ) -> list[GeneratedSample]:
        """Returns the model's greedy answers to the prompts of ``rows``."""
        data = self._datamodule
        batch = data.collator()(rows)
        answers = answers_to(self, batch, Sampling(max_new_tokens))
        return [
            GeneratedSample(
                data.tokenizer.decode(row["input_ids"], skip_special_tokens=True),
                str(one["columns"].get("expected", "")),
                text,
                bool(cut),
            )
            for row, one, text, cut in zip(
                rows, batch["rows"], answers.texts, answers.cut, strict=True
            )
        ]


def _short(path: str) -> str:
    return path.rpartition(".")[2]
