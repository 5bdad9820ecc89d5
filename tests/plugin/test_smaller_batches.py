"""Out of memory in a step: the fit goes on with smaller batches, as if it had begun with them."""

from __future__ import annotations

import logging

import pytest
import torch
from modules import ROOTS, differing, loader, rows, saver, strategy, task, trainer, weights
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from lightning_peft.errors import LifecycleError, UnsupportedError
from lightning_peft.plugin.namespace import bind_to_lightning
from lightning_peft.tasks.validation_budget import ValidationBudget

ROOT = ROOTS[0]


def give_memory(module, most, start=0):
    """Lets steps with more rows than ``most`` run out of memory, after ``start`` of them."""
    usual, seen = module.training_step, []

    def limited(batch, batch_idx):
        loss = usual(batch, batch_idx)
        seen.append(len(batch[0]))
        module.log("loss", loss, on_step=False, on_epoch=True)
        if seen[-1] > most and len(seen) > start:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss

    module.training_step, module.seen = limited, seen
    return module


def fit(tmp_path, size=8, accumulate=2, most=99, start=0, count=46, on=True, module=None, **given):
    """Trains blocks with dropout and batch norms for two epochs; returns Trainer and module."""
    torch.manual_seed(5)
    module = give_memory(module or task(kind="residuals"), most, start)
    data = DataLoader(rows("residuals", count), batch_size=size, shuffle=True)
    settings = {"max_epochs": 2, "gradient_clip_val": 0.5, "val_check_interval": 0.5}
    path = given.pop("ckpt_path", None)
    run = trainer(
        tmp_path,
        strategy(target_modules=["up", "down"], halve_batch_on_oom=on),
        accumulate_grad_batches=accumulate,
        **{**settings, **given},
    )
    run.fit(module, data, loader("residuals"), ckpt_path=path)
    assert (data.batch_size, data.batch_sampler.batch_size) == (size, size)
    assert run.accumulate_grad_batches == accumulate
    return run, module


@pytest.mark.parametrize(("most", "smaller"), [(4, (4, 4)), (2, (2, 8))])
def test_the_run_is_that_of_smaller_batches(most, smaller, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run, module = fit(tmp_path, most=most)
    expected, straight = fit(tmp_path, *smaller)
    # Adapters, and buffers that the steps without an end had changed.
    assert not differing(weights(module), weights(straight))
    assert run.global_step == expected.global_step == 6
    assert run.callback_metrics["loss"] == expected.callback_metrics["loss"]
    lines = [text for text in caplog.messages if text.startswith("Out of memory after optimizer")]
    assert len(lines) == 8 // most // 2
    assert "has 4 rows instead of 8, and an optimizer step 4 batches instead of 2" in lines[0]


def test_it_goes_on_from_the_last_optimizer_step(tmp_path):
    """From the first batch of the fifth step, where the second one does not fit."""
    module = task(kind="linears")
    run, module = fit(tmp_path, most=4, start=9, count=48, module=without_norm(module))
    expected, straight = fit(tmp_path, count=48, module=without_norm(task(kind="linears")))
    assert module.seen == [*[8] * 10, *[4] * 8]
    assert run.global_step == expected.global_step == 6
    found, wanted = weights(module), weights(straight)
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-6)


def without_norm(module):
    module.model.norm = torch.nn.Identity()
    module.model.up, module.model.down = module.model.layers
    return module


def test_a_run_with_smaller_batches_is_resumed(tmp_path):
    points = saver(ROOT, tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run, module = fit(tmp_path, most=4, start=3, callbacks=[points])
    # With the argument or without, since the checkpoint knows.
    for on, step in ((True, 2), (False, 5)):
        again, other = fit(tmp_path, on=on, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert set(other.seen) <= {4, 2}
        assert again.global_step == run.global_step
        assert not differing(weights(other), weights(module))
    # The user has made them smaller.
    _, other = fit(tmp_path, 4, 4, ckpt_path=tmp_path / "step=2.ckpt")
    assert not differing(weights(other), weights(module))


def test_validations_come_after_the_same_rows(tmp_path):
    def validated(size, accumulate, most=99):
        module, steps = task(kind="residuals"), []
        module.on_validation_end = lambda: steps.append(module.trainer.global_step)
        budget = bind_to_lightning(ValidationBudget, ROOT)(most=3)
        given = {"callbacks": [budget], "val_check_interval": 1.0}
        fit(tmp_path, size, accumulate, most, start=3, count=48, module=module, **given)
        return steps

    assert validated(8, 2) == validated(8, 2, most=4) == validated(4, 4) == [1, 2, 3, 4, 5, 6]


def test_an_odd_batch_keeps_its_rows(tmp_path):
    _, module = fit(tmp_path, size=9, most=3, count=24, max_epochs=1)
    assert module.seen == [9, *[3] * 8]


def test_a_batch_of_one_row_is_the_least(tmp_path):
    module = without_norm(task(kind="linears"))
    with pytest.raises(LifecycleError, match=r"Out of memory.*: the batch is one row") as error:
        fit(tmp_path, size=2, most=0, module=module)
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)
    with pytest.raises(torch.OutOfMemoryError):
        fit(tmp_path, most=0, on=False)


def test_parameters_that_may_be_half_stepped_are_not_trained_on(tmp_path):
    module = task(kind="residuals")

    def spoil(*given):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    module.on_before_optimizer_step = spoil
    with pytest.raises(LifecycleError, match="it was the optimizer's step"):
        fit(tmp_path, module=module)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(rows("residuals"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: Loader(loader("residuals")), "Loader as a loader"),
        (lambda: DataLoader(Stream(), batch_size=4), "an IterableDataset"),
        (lambda: [loader("residuals"), loader("residuals")], "2 training loaders"),
        (
            lambda: DataLoader(
                rows("residuals"), batch_sampler=Own(SequentialSampler(range(24)), 4, False)
            ),
            "batch_sampler=Own",
        ),
    ],
)
def test_loaders_whose_batches_stay_as_they_are(data, message, tmp_path):
    module = task(kind="residuals")
    run = trainer(tmp_path, strategy("lora", halve_batch_on_oom=True))
    with pytest.raises(UnsupportedError, match=f"halve_batch_on_oom=True .*(?s:.*){message}"):
        run.fit(module, data())
    assert not module.losses


class Loader:
    """Hands on what another one loads."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)


class Own(BatchSampler):
    pass


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("automatic_optimization", False, "manual"), ("couples_rows", True, "compares the rows")],
)
def test_modules_whose_loss_would_be_another(name, value, message, tmp_path):
    module = task(kind="residuals")
    setattr(module, name, value)
    run = trainer(tmp_path, strategy("lora", halve_batch_on_oom=True))
    with pytest.raises(UnsupportedError, match=message):
        run.fit(module, loader("residuals"))
