"""Runs with monitored schedulers, resumed from each of their checkpoints: as if uninterrupted.

Where Lightning leaves something out that no file can hold, resuming says so.
"""

from __future__ import annotations

import logging

import pytest
import torch
from modules import ROOTS, differing, lightning, loader, saver, seed, strategy, task_class, weights
from modules import trainer as make_trainer
from test_resume import flat

EarlyStopping = lightning(ROOTS[0]).callbacks.EarlyStopping


class Monitored(task_class(ROOTS[0])):
    """Logs for steps and epochs, draws while validating, and halves its rate by what it logs."""

    schedule = ("val_loss", "epoch")

    def training_step(self, batch, batch_idx):
        value = super().training_step(batch, batch_idx)
        self.log("train_loss", value.detach(), on_step=True, on_epoch=True)
        self.log("most", value.detach(), on_step=False, on_epoch=True, reduce_fx="max")
        return value

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        noisy = [batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]]
        name = "val_loss" if dataloader_idx == 0 else "other_loss"
        self.log(name, self.loss(noisy), add_dataloader_idx=False)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        monitor, interval = self.schedule
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.7, patience=0, threshold=0.05
        )
        config = {"scheduler": schedule, "monitor": monitor, "interval": interval, "strict": False}
        return {"optimizer": optimizer, "lr_scheduler": config}


def run(folder, schedule, points, ckpt_path=None, val_loaders=1, **given):
    module = Monitored()
    module.schedule = schedule
    stopping = EarlyStopping(schedule[0], patience=50, check_on_train_epoch_end=False)
    if schedule[0] != "val_loss":
        stopping = EarlyStopping("train_loss_epoch", patience=50, check_on_train_epoch_end=True)
    trainer = make_trainer(
        folder / "root",
        strategy("lora", lora_dropout=0.3),
        enable_checkpointing=bool(points),
        callbacks=[stopping, *(saver(ROOTS[0], folder, save_top_k=-1, **p) for p in points)],
        **{"max_epochs": 3, **given},
    )
    validation = [loader(shuffle=True) for _ in range(val_loaders)]
    trainer.fit(module, loader(shuffle=True), validation, ckpt_path=ckpt_path)
    return module, trainer, stopping


def resume_everywhere(folder, caplog, schedule, points, **given):
    """Resumes from every checkpoint.

    Returns the files, what differs in the runs resumed from them, and what those logged.
    """
    seed(3)
    expected, straight, counted = run(folder, schedule, points, **given)
    files = sorted(folder.glob("*.ckpt"))
    differ, notices = {}, {}
    for file in files:
        seed(1000)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="lightning_peft"):
            module, trainer, stopping = run(folder, schedule, [], file, **given)
        notices[file.stem] = "\n".join(
            r.getMessage() for r in caplog.records if r.message.startswith("The checkpoint was")
        )
        tail = expected.losses[len(expected.losses) - len(module.losses) :]
        states = [
            flat(t.lr_scheduler_configs[0].scheduler.state_dict()) for t in (trainer, straight)
        ]
        if not module.losses:
            # Of the end of the last epoch.
            assert trainer.global_step == straight.global_step
            continue
        found = [
            *(["losses"] if module.losses != tail else []),
            *differing(weights(module), weights(expected)),
            *[key for key in states[0] if states[0][key] != states[1][key]],
            *(["step"] if trainer.global_step != straight.global_step else []),
            *(["count"] if not module.losses or len(module.losses) >= len(expected.losses) else []),
            *(["stopping"] if stopping.state_dict() != counted.state_dict() else []),
        ]
        if found:
            differ[file.stem] = found
    return files, differ, notices


BATCH = {"filename": "{epoch}-{step}-batch", "every_n_train_steps": 1}
EPOCH = {
    "filename": "{epoch}-{step}-epoch",
    "every_n_epochs": 1,
    "save_on_train_epoch_end": True,
}
VALIDATED = {
    "filename": "{epoch}-{step}-validated",
    "monitor": "val_loss",
    "save_on_train_epoch_end": False,
}


@pytest.mark.parametrize("monitor", ["val_loss", "train_loss_epoch"])
def test_plateau_scheduler_at_epoch_and_validation_end(monitor, tmp_path, caplog):
    """The rate lags an epoch behind in Lightning, or the monitored metric is missing."""
    given = {"val_check_interval": 0.5, "val_loaders": 2}
    files, differ, notices = resume_everywhere(
        tmp_path, caplog, (monitor, "epoch"), [EPOCH, VALIDATED], **given
    )
    assert len(files) == 9
    assert not differ
    assert not any(notices.values())


def test_plateau_scheduler_inside_an_epoch(tmp_path, caplog):
    """Of six batches, validated after the third and the sixth; gradients of two are one step."""
    points = [{"filename": "{step}-{epoch}", "every_n_train_steps": 1}]
    given = {"val_check_interval": 0.5, "accumulate_grad_batches": 2}
    files, differ, notices = resume_everywhere(
        tmp_path, caplog, ("train_loss_epoch", "epoch"), points, **given
    )
    assert len(files) == 9
    last = {name for name, text in notices.items() if "after the last batch" in text}
    assert last == {
        name for name in notices if name.split("-")[0] in ("step=3", "step=6", "step=9")
    }
    assert not {name for name, text in notices.items() if text} - last
    # Weights are the same there too, until a step of the scheduler is missing.
    assert set(differ) <= last


SCHEDULES = [("val_loss", "epoch"), ("val_loss", "step"), ("train_loss_epoch", "epoch")]
SCHEDULES += [("most", "epoch"), ("train_loss_step", "step")]
TRAINERS = [
    {},
    {"val_check_interval": 0.5},
    {"val_check_interval": 2, "accumulate_grad_batches": 2, "val_loaders": 2},
    {"val_check_interval": 1, "accumulate_grad_batches": 2},
    {"accumulate_grad_batches": 4},
    {"val_check_interval": 4, "check_val_every_n_epoch": None},
    {"check_val_every_n_epoch": 2},
    {"limit_train_batches": 4},
    {"reload_dataloaders_every_n_epochs": 1},
    {"reload_dataloaders_every_n_epochs": 2},
]


@pytest.mark.long
@pytest.mark.parametrize("given", TRAINERS, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=" ".join)
def test_every_checkpoint(schedule, given, tmp_path, caplog):
    files, differ, notices = resume_everywhere(
        tmp_path, caplog, schedule, [BATCH, EPOCH, VALIDATED], **given
    )
    assert len(files) > 8
    assert not {name: found for name, found in differ.items() if not notices[name]}
