"""A packed batch gives the logits and gradients of its examples, each computed alone."""

from importlib import import_module
from time import process_time

import pytest
import torch
from paired import trainer_of
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from lightning_peft.data import packing as row_plans
from lightning_peft.data.encoding import IGNORED
from lightning_peft.data.packing import PackedRows, check_model, collate, plan_rows
from lightning_peft.errors import UnsupportedError
from lightning_peft.plugin.namespace import bind_to_lightning
from lightning_peft.plugin.strategies import LoRAStrategy
from lightning_peft.tasks.causal_lm import CausalLM

from .conftest import pairs

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def llama(attention="sdpa", dtype=torch.float32):
    config = LlamaConfig(attn_implementation=attention, **SIZES)
    return LlamaForCausalLM(config).to(dtype).train()


def gpt2(attention="sdpa", dtype=torch.float32):
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(**sizes, **drop, attn_implementation=attention)
    return GPT2LMHeadModel(config).to(dtype).train()


def examples(*lengths):
    rows = []
    for length in lengths:
        ids = torch.randint(0, 64, (length,)).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED] * 3 + ids[3:]})
    return rows


def mean_loss(logits, labels):
    """Returns the mean loss as transformers computes it, in the dtype of the logits."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def gradients(model):
    found = {name: param.grad.clone() for name, param in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_packed_batch_equals_its_examples_alone(build, attention):
    model = build(attention, torch.float64)
    rows = [examples(7, 12, 4), examples(9, 5)]  # The second row is filled up.
    batch = collate(rows, pad_token_id=0)
    batch["attention_mask"] = batch["attention_mask"].double()
    assert batch["input_ids"].shape == (2, 23)
    labels = batch.pop("labels")
    packed = model(**batch).logits
    mean_loss(packed, labels).backward()
    from_packed = gradients(model)
    logits, alone_labels = [], []
    for i, row in enumerate(rows):
        start = 0
        for example in row:
            alone = model(input_ids=torch.tensor([example["input_ids"]])).logits[0]
            stop = start + len(alone)
            torch.testing.assert_close(packed[i, start:stop], alone)
            logits.append(alone[:-1])
            alone_labels.append(torch.tensor(example["labels"][1:]))
            start = stop
    torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(alone_labels)).backward()
    for name, expected in gradients(model).items():
        assert expected.abs().max() > 0
        torch.testing.assert_close(from_packed[name], expected, msg=name)


@pytest.mark.parametrize("spoil", ["attention_mask", "position_ids"])
def test_the_comparison_notices_a_leak(spoil):
    model = gpt2(dtype=torch.float64)
    (row,) = [examples(7, 12)]
    batch = collate([row], pad_token_id=0)
    del batch[spoil]
    if "attention_mask" in batch:
        batch["attention_mask"] = batch["attention_mask"].double()
    else:
        batch["position_ids"] = torch.arange(19)[None]
    alone = model(input_ids=torch.tensor([row[1]["input_ids"]])).logits[0]
    assert (model(**batch).logits[0, 7:] - alone).abs().max() > 1e-3


def test_the_first_token_of_an_example_is_never_trained():
    rows = [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3, 4], "labels": [3, 4]}]
    batch = collate([rows], pad_token_id=0)
    assert batch["labels"].tolist() == [[IGNORED, 2, IGNORED, 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1]]


def test_every_example_is_in_one_row_that_holds_it():
    lengths = torch.randint(1, 101, (2000,)).tolist()
    rows = plan_rows(lengths, 100)
    assert sorted(place for row in rows for place in row) == list(range(2000))
    assert all(0 < sum(lengths[place] for place in row) <= 100 for row in rows)
    packed = PackedRows([{"input_ids": [0] * n} for n in lengths], lengths, 100)
    assert packed.efficiency > 0.97
    assert packed.efficiency == pytest.approx(sum(lengths) / (100 * len(rows)))
    assert [len(row[0]["input_ids"]) for row in packed] == [lengths[row[0]] for row in rows]
    assert packed[-1] == packed[len(rows) - 1]
    assert plan_rows([100, 1, 100], 100) == [[0], [2], [1]]
    assert plan_rows([], 100) == []


def test_rows_of_many_examples_are_planned_at_once_and_as_full_as_by_best_fit():
    generator = torch.Generator().manual_seed(0)
    lengths = (6 + torch.randn(20_000, generator=generator)).exp().clamp(5, 4096).int().tolist()
    started = process_time()
    rows = plan_rows(lengths, 4096)
    # It took 13 s to look at all lengths for each row.
    assert process_time() - started < 2
    assert len(rows) <= -(-sum(lengths) // 4096) + 1
    # Sums of even lengths never fill these rows, and best fit needs fewer of them.
    even = [2 * n for n in torch.randint(100, 300, (300,), generator=generator).tolist()]
    searched, fitted = row_plans._search_rows(even, 1025), row_plans._fit_rows(even, 1025)
    assert len(plan_rows(even, 1025)) == len(fitted) < len(searched)


def test_more_than_can_be_searched_goes_by_best_fit(monkeypatch):
    lengths = [60, 50, 45, 30, 10, 5]
    monkeypatch.setattr(row_plans, "MOST_STEPS", 1)
    assert row_plans._search_rows(lengths, 100) is None
    assert plan_rows(lengths, 100) == [[0, 3, 4], [1, 2, 5]]


def recurrent():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    return MambaForCausalLM(MambaConfig(vocab_size=64, **sizes))


def convolved():
    return Lfm2ForCausalLM(Lfm2Config(layer_types=["conv", "full_attention"], **SIZES))


def windowed():
    return MistralForCausalLM(MistralConfig(sliding_window=16, **SIZES))


class Deaf(LlamaForCausalLM):
    """Drops the mask, as models do that take no part in transformers' masking."""

    def forward(self, attention_mask=None, position_ids=None, **batch):
        return super().forward(**batch)


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_keep_examples_apart_pass_and_keep_their_modes(build, dtype):
    model = build(dtype=dtype)
    next(model.children()).eval()
    modes = [module.training for module in model.modules()]
    check_model(model, 64)
    assert [module.training for module in model.modules()] == modes
    assert len(set(modes)) == 2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (recurrent, "MambaForCausalLM cannot run packed rows"),
        (lambda: Deaf(LlamaConfig(**SIZES)), "Packed examples see each other in Deaf"),
        (convolved, "Packed examples see each other in Lfm2"),
        (windowed, "attends to the last 16 tokens only"),
        (lambda: llama("flex_attention"), "attn_implementation='flex_attention'"),
    ],
)
def test_models_that_do_not_are_refused(build, message):
    with pytest.raises(UnsupportedError, match=message):
        check_model(build(), 64)


def fit(make, write, tiny_model, precision="32-true", **options):
    root = "lightning.pytorch"
    data = make(write(pairs(24)), validation_share=0.2, max_length=64, root=root, **options)
    losses = []

    class Task(CausalLM):
        def training_step(self, batch, batch_idx):
            losses.append((super().training_step(batch, batch_idx).detach(), batch))
            return super().training_step(batch, batch_idx)

    strategy = bind_to_lightning(LoRAStrategy, root)(r=2, announce=False)
    trainer = trainer_of(strategy, root, precision=precision, max_steps=-1, max_epochs=1)
    import_module(root).seed_everything(3, verbose=False)
    trainer.fit(bind_to_lightning(Task, root)(tiny_model, dtype="float32"), data)
    assert torch.isfinite(trainer.callback_metrics["val_loss"])
    return losses


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_packed_rows_train_in_every_precision(precision, make, write, tiny_model):
    losses = fit(make, write, tiny_model, precision, packing=True, batch_size=2)
    assert all(torch.isfinite(loss) for loss, _ in losses)
    assert {batch["attention_mask"].ndim for _, batch in losses} == {4}
    assert sum(batch["input_ids"].shape[0] for _, batch in losses) < 16
