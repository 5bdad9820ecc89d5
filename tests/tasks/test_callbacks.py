import importlib

import pytest
import short_runs
import torch
from torch.utils.data import DataLoader

from lightning_peft.data.supervised import SupervisedData
from lightning_peft.demo.run import BASE, INSTRUCTIONS
from lightning_peft.errors import ConfigError
from lightning_peft.plugin.interruption import SaveOnInterrupt
from lightning_peft.plugin.namespace import ROOTS, bind_to_lightning
from lightning_peft.plugin.restarts import MergeAndRestart
from lightning_peft.plugin.strategies import LoRAStrategy
from lightning_peft.tasks.callbacks import BestCheckpoint, LogSamples, StopEarly
from lightning_peft.tasks.causal_lm import CausalLM
from lightning_peft.tasks.samples import GeneratedSample

ROWS = torch.arange(12.0)[:, None]


def fit(folder, *callbacks, root=ROOTS[0], losses=(), **options):
    """Trains a line, whose validation losses are as given."""
    trainer = short_runs.trainer(
        root=root,
        callbacks=[bind_to_lightning(cls, root)(**given) for cls, given in callbacks],
        default_root_dir=str(folder),
        **{"max_epochs": 1, "num_sanity_val_steps": -1, "enable_checkpointing": True, **options},
    )
    trainer.fit(short_runs.line(root, losses), DataLoader(ROWS, 1), DataLoader(ROWS[:1], 1))
    return trainer


def step_of(path):
    return torch.load(path, weights_only=True)["global_step"]


@pytest.mark.parametrize("root", ROOTS)
def test_the_best_and_the_last_are_kept(root, tmp_path):
    losses = [3.0, 1.0, 2.0]
    given = (BestCheckpoint, {})
    fit(tmp_path, given, root=root, losses=losses, val_check_interval=4)
    files = {path.name: step_of(path) for path in tmp_path.rglob("*.ckpt")}
    assert files == {"best.ckpt": 8, "last.ckpt": 12}


def test_what_was_learnt_last_is_saved(tmp_path):
    fit(tmp_path, (BestCheckpoint, {}), losses=[1.0], val_check_interval=5, max_steps=7)
    files = {path.name: step_of(path) for path in tmp_path.rglob("*.ckpt")}
    assert files == {"best.ckpt": 5, "last.ckpt": 7}


def test_saving_in_between_does_not_hide_the_best(tmp_path):
    given = (BestCheckpoint, {"save_every": 3})
    fit(tmp_path, given, losses=[2.0, 1.0], val_check_interval=6)
    files = {path.name: step_of(path) for path in tmp_path.rglob("*.ckpt")}
    assert files == {"best.ckpt": 12, "last.ckpt": 12}


@pytest.mark.parametrize("cls", [BestCheckpoint, StopEarly])
def test_a_metric_that_never_comes_is_reported_before_the_first_step(cls, tmp_path):
    with pytest.raises(ConfigError, match="needs validation rows, and there are none"):
        fit(tmp_path, (cls, {}), limit_val_batches=0)
    with pytest.raises(ConfigError, match=r"monitor='val_los'\): Module logs val_loss"):
        fit(tmp_path, (cls, {"monitor": "val_los"}), losses=[1.0])
    assert not list(tmp_path.rglob("*.ckpt"))


def test_training_stops_without_improvement(tmp_path):
    losses = [5.0, 4.0, 4.0, 4.1, 3.0, 3.0]
    given = (StopEarly, {"patience": 2})
    trainer = fit(tmp_path, given, losses=losses, val_check_interval=2, enable_checkpointing=False)
    assert trainer.global_step == 8


def answers_of_a_fit(folder, root, method=None, rate=1e-2, callbacks=(), start=None, **options):
    """Trains two steps; returns the data, and steps and answers with their step in order."""
    lightning = importlib.import_module(root)
    events = []

    class Keep(lightning.Callback):
        def record_samples(self, samples, step):
            events.append((step, samples))

        def on_before_optimizer_step(self, trainer, module, optimizer):
            events.append("step")

    data = bind_to_lightning(SupervisedData, root)(
        str(INSTRUCTIONS),
        str(BASE),
        chat_template="plain",
        columns={"prompt": "prompt", "completion": "response"},
        cache_dir=str(folder / "cache"),
    )
    trainer = short_runs.trainer(
        method,
        root,
        callbacks=[
            bind_to_lightning(LogSamples, root)(count=2, max_new_tokens=4), Keep(), *callbacks
        ],
        **{"limit_train_batches": 2, "limit_val_batches": 1, "max_epochs": 1} | options,
    )  # fmt: skip
    task = bind_to_lightning(CausalLM, root)(
        str(BASE), learning_rate=rate, warmup=0.0, dtype="float32"
    )
    trainer.fit(task, datamodule=data, ckpt_path=start)
    # A generation leaves the module as it was.
    assert task.model.training
    return data, events


@pytest.fixture(scope="module")
def without_adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("without")
    return folder, *answers_of_a_fit(folder, ROOTS[0])


def test_base_and_model_answer(without_adapters):
    folder, data, events = without_adapters
    (before, first), *steps, (after, last) = events
    assert (before, steps, after) == (0, ["step", "step"], 2)
    assert all(isinstance(sample, GeneratedSample) for sample in first)
    assert [sample.prompt for sample in first] == [sample.prompt for sample in last]
    assert all(sample.prompt.startswith("### User:") for sample in first)
    rows = data.read().splits["validation"]
    whole = data.tokenizer.decode(rows[0]["input_ids"], skip_special_tokens=True)
    assert first[0].prompt + first[0].expected == whole
    assert [s.generated for s in first] != [s.generated for s in last]
    # Below adapters the base is still there after the first step, which so comes earlier.
    _, events = answers_of_a_fit(folder, ROOTS[1], "lora", 0.3)
    assert events[0] == "step"
    assert events[1] == (0, first)
    assert events[2] == "step"
    assert events[3][0] == 2
    assert events[3][1] != first


@pytest.mark.parametrize(
    ("given", "options", "first"),
    [
        ({"use_dora": True, "modules_to_save": ["norm"]}, {}, "step"),
        # With adapters off, a part of the weights is missing.
        ({"init_lora_weights": "pissa"}, {}, "base"),
        ({}, {"callbacks": [bind_to_lightning(MergeAndRestart, ROOTS[0])(1)]}, "base"),
        # A validation before the first step has them.
        (
            {},
            {"accumulate_grad_batches": 2, "val_check_interval": 1, "limit_train_batches": 2},
            "base",
        ),
        # As of an adapter that was trained before.
        ({"init_lora_weights": False}, {}, "others"),
    ],
)
def test_answers_at_step_0_are_those_of_the_base(without_adapters, given, options, first):
    folder, _, ((_, plain), *_) = without_adapters
    strategy = bind_to_lightning(LoRAStrategy, ROOTS[0])
    method = strategy(r=4, announce=False, optimizer=None, **given)
    options = {"limit_train_batches": 1, **options}
    _, events = answers_of_a_fit(folder, ROOTS[0], method, 0.3, **options)
    assert events.index("step") == (first != "step")
    (step, before), (_, after) = [event for event in events if event != "step"]
    assert step == 0
    assert (before == plain) == (first != "others")
    assert after != before


def test_a_run_that_is_stopped_in_its_first_step_leaves_the_base_for_later(
    without_adapters, tmp_path
):
    folder, _, ((_, plain), *_) = without_adapters
    listener = bind_to_lightning(SaveOnInterrupt, ROOTS[0])()

    class Stops(importlib.import_module(ROOTS[0]).Callback):
        batches = 0

        def on_train_batch_start(self, *_):
            listener.request(stop=True)

        def on_train_batch_end(self, *_):
            self.batches += 1

    stops = Stops()
    given = {"callbacks": [stops, listener], "default_root_dir": str(tmp_path)}
    _, events = answers_of_a_fit(folder, ROOTS[0], "lora", 0.3, **given)
    # Callbacks behind see the step.
    assert (events, stops.batches) == (["step"], 1)
    _, events = answers_of_a_fit(folder, ROOTS[0], "lora", 0.3, start=listener.saved)
    assert events[:2] == ["step", (0, plain)]
    assert [step for step, _ in events[2:]] == [2]


def test_samples_that_cannot_be_had_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="Module has no generate_samples"):
        fit(tmp_path, (LogSamples, {}))
    with pytest.raises(ConfigError, match="both are 1 at least"):
        bind_to_lightning(LogSamples, ROOTS[0])(count=0)
