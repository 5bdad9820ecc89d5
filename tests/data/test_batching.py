"""Padding, and batches of like length that are the same for a seed and an epoch."""

from importlib import import_module

import pytest
import torch
from paired import trainer_of
from torch.utils.data import DataLoader

from lightning_peft.data.batching import LengthGroupedSampler, pad
from lightning_peft.data.encoding import IGNORED
from lightning_peft.plugin.namespace import bind_to_lightning
from lightning_peft.plugin.strategies import LoRAStrategy
from lightning_peft.tasks.causal_lm import CausalLM

from .conftest import pairs

ROOT = "pytorch_lightning"


def test_padding_is_neither_attended_to_nor_trained():
    rows = [
        {"input_ids": [5, 6], "labels": [IGNORED, 6]},
        {"input_ids": [7, 8, 9], "labels": [IGNORED, 8, 9]},
    ]
    batch = pad(rows, pad_token_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 1], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 6, IGNORED], [IGNORED, 8, 9]]
    assert {value.dtype for value in batch.values()} == {torch.int64}


def sampler(lengths, batch_size=4, seed=0, processes=1, rank=0):
    return LengthGroupedSampler(lengths, batch_size, seed, processes, rank)


@pytest.fixture
def lengths():
    return torch.randint(1, 200, (1001,)).tolist()


def padding(order, lengths, batch_size=4):
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    full = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths[i] for i in order) / full


def test_every_row_comes_once_and_with_its_like(lengths):
    order = list(sampler(lengths))
    assert sorted(order) == list(range(1001))
    mixed = torch.randperm(1001).tolist()
    assert padding(order, lengths) < 0.05 < 0.25 < padding(mixed, lengths)
    # Short and long batches alternate at random: no drift from short to long.
    means = [sum(lengths[i] for i in order[k : k + 100]) / 100 for k in range(0, 1000, 100)]
    assert max(means) < 2 * min(means)


def test_the_order_depends_on_seed_and_epoch_alone(lengths):
    one, two, other = sampler(lengths), sampler(lengths), sampler(lengths, seed=1)
    torch.rand(3)
    assert list(one) == list(two) == list(one)
    assert list(one) != list(other)
    one.set_epoch(1)
    assert list(one) != list(two)
    two.set_epoch(1)
    assert list(one) == list(two)


def test_processes_share_the_rows_and_the_lengths(lengths):
    orders = [list(sampler(lengths, processes=3, rank=rank)) for rank in range(3)]
    assert [len(order) for order in orders] == [334] * 3
    assert {row for order in orders for row in order} == set(range(1001))
    for order in orders:
        assert padding(order, lengths) < 0.1
    for step in range(0, 320, 4):
        together = [lengths[i] for order in orders for i in order[step : step + 4]]
        assert max(together) - min(together) <= 40
    assert len(list(sampler([3, 4], processes=3, rank=2))) == 1


def test_many_rows_take_little_memory():
    # As many numbers as rows times rows would not fit into the memory of any machine.
    order = list(sampler([1 + i % 900 for i in range(300_000)], processes=7, rank=6))
    assert len(set(order)) == len(order) == -(-300_000 // 7)


class Recorded(CausalLM):
    """Remembers the tokens of each batch."""

    def __init__(self, model):
        super().__init__(model, dtype="float32")
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["input_ids"].clone())
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("option", ["length_grouping", "packing", "none"])
def test_a_run_resumed_inside_an_epoch_sees_the_same_batches(
    option, make, write, tmp_path, tiny_model
):
    lightning = import_module(ROOT)
    path = write(pairs(16))

    def run(**fit):
        lightning.seed_everything(5, verbose=False)
        grouping = {option: True} if option != "none" else {}
        data = make(path, validation_share=0, max_length=64, batch_size=2, **grouping)
        task = bind_to_lightning(Recorded, ROOT)(tiny_model)
        points = lightning.callbacks.ModelCheckpoint(
            dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1
        )
        strategy = bind_to_lightning(LoRAStrategy, ROOT)(r=2, announce=False)
        steps = {"max_steps": -1, "max_epochs": 2, "enable_checkpointing": True}
        trainer_of(strategy, ROOT, callbacks=[points], **steps).fit(task, data, **fit)
        return task.seen

    straight = run()
    steps = len(straight)
    per_epoch = steps // 2
    assert per_epoch > 2
    first, second = straight[:per_epoch], straight[per_epoch:]
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for stop in (per_epoch, per_epoch + 1):
        resumed = run(ckpt_path=tmp_path / f"step={stop}.ckpt")
        assert len(resumed) == steps - stop
        for one, other in zip(resumed, straight[stop:], strict=True):
            assert torch.equal(one, other)


def test_lightning_keeps_the_order_of_several_processes(make, write):
    data = make(write(pairs(30)), validation_share=0, length_grouping=True)
    loader = data.train_dataloader()
    # Lightning puts a sampler of its own in place of any that is not a DistributedSampler.
    assert isinstance(loader, DataLoader)
    assert isinstance(loader.sampler, torch.utils.data.DistributedSampler)
