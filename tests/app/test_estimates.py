"""How long a run takes, by the record of earlier ones: counted by hand here."""

import yaml

from gradio_app.experiments.estimates import (
    Work,
    calculated_duration,
    expected_duration,
    planned_work,
)
from gradio_app.experiments.summaries import Summaries, kind_of
from gradio_app.recipe.content import with_value
from gradio_app.recipe.edits import base_recipe, with_method
from gradio_app.runs.store import RunStore
from tests.app.runs import settings


def test_work_is_counted_over_all_epochs_and_up_to_the_last_step():
    numbers = {"splits": {"train": {"rows": 100, "tokens": 1300}}}
    content = base_recipe("sft", small=False)
    # 13 batches of 8, two of them in a step, in 2 epochs.
    assert planned_work(content, numbers) == Work(200, 2600)
    content = with_value(content, "trainer.limit_train_batches", 0.5)
    assert planned_work(content, numbers) == Work(200 * 6 / 13, 2600 * 6 / 13)
    content = with_value(content, "trainer.max_steps", 3)
    assert planned_work(content, numbers) == Work(100 * 6 / 13, 1300 * 6 / 13)
    endless = with_value(base_recipe("sft", small=False), "trainer.max_epochs", -1)
    assert planned_work(endless, numbers) is None
    assert planned_work(content, {"series": True}) is None
    for path in ("trainer.accumulate_grad_batches", "data.init_args.batch_size"):
        for value in (0, None, "8"):
            assert planned_work(with_value(content, path, value), numbers) is None


def test_packed_rows_make_fewer_batches():
    train = {"rows": 100, "tokens": 1300, "trained_tokens": 650}
    numbers = {"splits": {"train": train}, "packing": {"rows": 20}}
    content = with_value(base_recipe("sft", small=False), "trainer.max_steps", 7)
    content = with_value(content, "trainer.max_epochs", 9)
    # An epoch has 7 steps of two batches; of 20 packed rows, 2.
    assert planned_work(content, numbers) == Work(100, 1300, 650)
    content = with_value(content, "data.init_args.packing", True)
    assert planned_work(content, numbers) == Work(350, 4550, 2275)


def test_runs_of_one_kind_share_task_and_devices():
    content = base_recipe("sft")
    same = with_value(content, "trainer.devices", "auto")
    assert kind_of(same) == kind_of(content)
    others = [
        with_value(content, "trainer.devices", 2),
        with_value(content, "trainer.accelerator", "tpu"),
        with_value(content, "model.class_path", "lightning_peft.tasks.RewardTuning"),
        with_value(content, "model.class_path", "mine.Tuning"),
        with_value(content, "model.init_args.model", "org/other"),
    ]
    assert len({kind_of(one) for one in [content, *others]}) == 6


def test_a_range_is_that_of_the_steps_of_earlier_runs_of_the_same_kind(tmp_path):
    store, summaries, content = RunStore(settings(tmp_path)), Summaries(), base_recipe("sft")

    def took(recipe, rates, seconds):
        run = store.create("local", yaml.safe_dump(recipe), "a run")
        for step, rate in enumerate(rates, start=1):
            row = {"step": step, "tokens_per_second": rate}
            run.folder.append(run.folder.metrics, row)
        run.folder.write(run.folder.result, {"seconds": seconds, "tokens": 1400})
        store.update_metadata(run, launched=0.0, kill_asked=1.0)

    def expected():
        return expected_duration(content, Work(9, 1800), store.list("local"), summaries)

    took(with_method(content, "qlora"), [1.0], 5)
    took(content, [], 5)
    assert expected() is None
    # 1,400 tokens at 140 a second took 10 of its 30 seconds.
    took(content, range(100, 200, 10), 30)
    found = expected()
    assert (found.low, found.high, found.runs) == (20 + 1800 / 180, 20 + 1800 / 100, 1)
    content = with_value(content, "trainer.max_time", "00:00:00:12")
    assert (expected().low, expected().high) == (20 + 1800 / 180, 20 + 12)
    content = with_value(content, "trainer.max_time", {"seconds": 15})
    assert expected().high == 20 + 15
    content = with_value(content, "trainer.max_time", None)
    took(content, [70.0], 20)
    found = expected()
    assert (found.low, found.high, found.runs) == (1800 / 70, 20 + 1800 / 100, 2)


def test_before_the_first_run_a_range_is_calculated_from_the_processor():
    content = base_recipe("sft", small=False)
    run = {"method": "lora", "gradient_checkpointing": False, "seq_len": 100}
    plan = {"total_parameters": 10**8, "run": run}
    assert calculated_duration(content, Work(9, 0), plan) is None
    found = calculated_duration(content, Work(50, 5000), plan)
    # 2e12 operations, by a processor of a billion to ten thousand billion a second.
    assert 10.1 < found.low < found.high < 240 + 3 * 2000
    assert found.runs == 0
    limited = with_value(content, "trainer.max_time", "00:00:00:01")
    slow = calculated_duration(limited, Work(50, 5_000_000), plan)
    assert (slow.low, slow.high) == (11, 241)
