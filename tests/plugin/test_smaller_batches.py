"""Out of memory in a step: the fit goes on with smaller batches, as if it had begun with them."""

from __future__ import annotations

import logging

import pytest
import torch
from modules import (
    ROOTS,
    differing,
    lightning,
    loader,
    rows,
    saver,
    strategy,
    task,
    trainer,
    weights,
)
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler, SequentialSampler

from lightning_peft.errors import LifecycleError, UnsupportedError
from lightning_peft.plugin.checkpoint_content import CHECKPOINT_KEY
from lightning_peft.plugin.namespace import bind_to_lightning
from lightning_peft.plugin.restart_record import RestartRecord
from lightning_peft.runs.recorder import RunRecorder
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
    path, checks = given.pop("ckpt_path", None), {"verify": given.pop("verify", "cheap")}
    run = trainer(
        tmp_path,
        strategy(target_modules=["up", "down"], halve_batch_on_oom=on, **checks),
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


def test_processes_started_again_take_the_division_of_their_fit(tmp_path, monkeypatch):
    """Of two fits in a folder; the second ends at the last restart."""
    points = saver(ROOT, tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run, _ = fit(tmp_path, max_epochs=1, callbacks=[points])
    other, _ = fit(tmp_path, 6, 1, max_epochs=1)
    counts = {"RUN_ID": "1", "MAX_RESTARTS": "2", "RESTART_COUNT": "1"}
    for name, value in counts.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    assert "torchrun starts all processes again" in str(RestartRecord(run).end(8, 4, ""))
    assert RestartRecord(run).division(8) == 4
    assert RestartRecord(run).division(6) == RestartRecord(other).division(8) == 1

    def divided(by, saved):
        content = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
        (mine,) = content[CHECKPOINT_KEY]["processes"]
        mine["smaller_batches"] = saved
        RestartRecord(by).divide(content)
        progress = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        count = mine["loaders"][0]["yielded"]
        # As Lightning counts at the end of a batch.
        wanted = dict.fromkeys(("ready", "started", "processed"), count)
        assert progress == {**wanted, "completed": count - 1}
        return count, mine["smaller_batches"]

    smaller = {"division": 4, "accumulate": 8}
    assert divided(run, None) == (16, smaller)
    assert divided(run, {"division": 2, "accumulate": 4}) == (8, smaller)
    assert divided(run, smaller) == (4, smaller)
    # The user has made them smaller since.
    assert divided(run, {"division": 2, "accumulate": 2}) == (16, smaller)
    assert divided(other, None) == (4, None)

    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    text = str(RestartRecord(other).end(6, 2, ""))
    assert "with batch_size=3 and accumulate_grad_batches=2, the same rows" in text
    assert (RestartRecord(run).division(8), RestartRecord(other).division(6)) == (4, 2)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert RestartRecord(run).division(8) == 1


def test_validations_come_after_the_same_rows(tmp_path):
    def validated(size, accumulate, most=99):
        module, steps = task(kind="residuals"), []
        module.on_validation_end = lambda: steps.append(module.trainer.global_step)
        budget = bind_to_lightning(ValidationBudget, ROOT)(most=3)
        given = {"callbacks": [budget], "val_check_interval": 1.0}
        fit(tmp_path, size, accumulate, most, start=3, count=48, module=module, **given)
        return steps

    assert validated(8, 2) == validated(8, 2, most=4) == validated(4, 4) == [1, 2, 3, 4, 5, 6]


def test_the_last_batch_divides_into_fewer(tmp_path):
    """Of 42 rows, six batches of 8 are eleven of 4."""

    def seen(most):
        module, found = task(kind="residuals"), []
        usual = module.configure_optimizers

        def configured():
            optimizers, (schedule,) = usual()
            return optimizers, [{**schedule, "frequency": 2}]

        def note():
            found.append((module.trainer.global_step, module.lr_schedulers().last_epoch))

        module.configure_optimizers, module.on_validation_end = configured, note
        fit(tmp_path, most=most, count=42, module=module)
        return found

    assert seen(4) == seen(99) == [(1, 1), (3, 3), (4, 4), (6, 6)]


def test_a_loader_that_is_reloaded_has_the_same_rows(tmp_path):
    _, module = fit(tmp_path, most=4, count=48, reload_dataloaders_every_n_epochs=1, max_epochs=3)
    assert module.seen == [8, *[4] * 36]


def test_a_module_that_asks_for_the_data_in_setup(tmp_path):
    def counting():
        module = task(kind="residuals")
        module.setup = lambda stage: module.trainer.estimated_stepping_batches
        return module

    points = saver(ROOT, tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    _, module = fit(tmp_path, most=4, module=counting(), callbacks=[points])
    _, straight = fit(tmp_path, 4, 4, module=counting())
    _, resumed = fit(tmp_path, module=counting(), ckpt_path=tmp_path / "step=2.ckpt")
    for one in (straight, resumed):
        assert not differing(weights(module), weights(one))


def test_a_trainer_without_callbacks(tmp_path):
    run, module = fit(tmp_path, most=4, enable_checkpointing=False, max_epochs=1)
    assert not run.callbacks
    assert set(module.seen[1:]) == {4, 2}


def test_what_is_verified_is_a_batch_that_fits(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "lightning_peft"):
        fit(tmp_path, most=4, verify="full", max_epochs=1)
    lines = [text for text in caplog.messages if text.startswith(("verify=", "Out of memory"))]
    assert [text[:6] for text in lines] == ["Out of", "verify"]


def test_a_trial_of_the_tuner_is_left_to_it(tmp_path):
    module = give_memory(task(kind="residuals"), most=4)
    module.batch_size = 2
    module.train_dataloader = lambda: DataLoader(rows("residuals"), batch_size=module.batch_size)
    module.val_dataloader = lambda: loader("residuals")
    finder = lightning(ROOT).callbacks.BatchSizeFinder(max_trials=3, steps_per_trial=1)
    run = trainer(
        tmp_path, strategy(target_modules=["up"], halve_batch_on_oom=True), callbacks=[finder]
    )
    run.fit(module)
    assert module.batch_size == 4
    assert module.seen == [2, 4, 8, *[4] * 6]


def test_means_keep_what_came_before_a_checkpoint(tmp_path):
    """Where the second batch after it does not fit."""
    points = saver(ROOT, tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    given = {"count": 48, "max_epochs": 1}
    run, _ = fit(tmp_path, module=without_norm(task(kind="linears")), callbacks=[points], **given)
    module, path = without_norm(task(kind="linears")), tmp_path / "step=1.ckpt"
    again, module = fit(tmp_path, most=4, start=1, module=module, ckpt_path=path, **given)
    assert module.seen == [8, 8, *[4] * 8]
    torch.testing.assert_close(again.callback_metrics["loss"], run.callback_metrics["loss"])


def test_rows_that_are_trained_again_are_counted_once(tmp_path):
    recorder = bind_to_lightning(RunRecorder, ROOT)(tmp_path / "run")
    _, module = fit(tmp_path, most=4, start=3, callbacks=[recorder])
    assert sum(module.seen) > recorder.pace.rows == 2 * 46


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
        (
            lambda: DataLoader(
                rows("residuals"),
                batch_sampler=BatchSampler(SequentialSampler(range(24)), 4, False),
            ),
            "batch_sampler=BatchSampler",
        ),
        (lambda: Stateful(rows("residuals"), batch_size=4), "Stateful, which goes on by a state"),
        (
            lambda: DataLoader(rows("residuals"), batch_size=4, sampler=Endless()),
            "sampler=Endless, which has no length",
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


class Stateful(DataLoader):
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Endless(Sampler):
    def __iter__(self):
        return iter(range(24))


def test_validations_that_count_the_batches_of_all_epochs(tmp_path):
    given = {"val_check_interval": 4, "check_val_every_n_epoch": None}
    with pytest.raises(UnsupportedError, match="a last batch that is not full"):
        fit(tmp_path, count=42, **given)
    fit(tmp_path, count=48, most=4, **given)


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
