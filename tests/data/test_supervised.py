"""The data module from YAML, and what it hands to a run."""

import sys
from importlib import import_module

import pytest
import torch
import yaml
from paired import trainer_of

import lightning_peft
from lightning_peft.demo.run import BASE
from lightning_peft.errors import ConfigError
from lightning_peft.plugin.namespace import ROOTS, bind_to_lightning, namespace, namespace_of
from lightning_peft.tasks.causal_lm import CausalLM

from .conftest import pairs


def config(data, tmp_path, **options):
    given = {
        "data": data,
        "tokenizer": str(BASE),
        "chat_template": "plain",
        "columns": {"prompt": "prompt"},
        "batch_size": 4,
        "validation_share": 0.2,
        "cache_dir": str(tmp_path / "cache"),
    }
    return {
        "model": {"model": str(BASE), "dtype": "float32"},
        "data": {"class_path": "lightning_peft.SupervisedData", "init_args": {**given, **options}},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }


@pytest.mark.parametrize("root", ROOTS)
def test_lightning_cli_makes_it_and_trains_on_it(root, write, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cli"])
    cli = import_module(f"{root}.cli").LightningCLI
    with namespace(root):
        made = cli(
            bind_to_lightning(CausalLM, root),
            args={"fit": config(write(pairs(30)), tmp_path), "subcommand": "fit"},
            subclass_mode_data=True,
            save_config_callback=None,
        )
        assert isinstance(made.datamodule, lightning_peft.SupervisedData)
    assert namespace_of(made.datamodule) == root
    assert made.trainer.global_step == len(made.datamodule.train_dataloader()) > 1
    assert torch.isfinite(made.trainer.callback_metrics["val_loss"])
    assert made.datamodule.record["split_by"]["shares"] == {"validation": 0.2}


@pytest.mark.parametrize(("key", "value"), [("over_lonk", 1), ("over_long", "drop")])
def test_a_wrong_key_or_value_is_an_error_before_anything_is_read(
    key, value, write, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["cli"])
    cli = import_module(f"{ROOTS[1]}.cli").LightningCLI
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config("rows", tmp_path, **{key: value})))
    with pytest.raises(SystemExit):
        cli(
            bind_to_lightning(CausalLM, ROOTS[1]),
            args=["fit", "--config", str(tmp_path / "run.yaml")],
            subclass_mode_data=True,
        )
    assert key in capsys.readouterr().err


def test_a_run_without_validation_or_test_rows_has_no_such_batches(make, write):
    data = make(write(pairs(10)), validation_share=0)
    assert data.val_dataloader() == []
    assert data.test_dataloader() == []
    assert len(data.train_dataloader()) == 3


def test_order_of_evaluation_is_that_of_the_rows(make, write):
    rows = [{**row, "split": "validation" if i else "train"} for i, row in enumerate(pairs(20))]
    data = make(write(rows), length_grouping=True)
    seen = [ids for batch in data.val_dataloader() for ids in batch["input_ids"]]
    stored = data.read().splits["validation"]["input_ids"]
    assert [row[: len(ids)].tolist() for row, ids in zip(seen, stored, strict=True)] == list(stored)


def test_workers_load_the_same_batches(make, write):
    path = write(pairs(20))
    for packing in (False, True):
        alone, helped = (
            make(path, validation_share=0.3, packing=packing, num_workers=workers).val_dataloader()
            for workers in (0, 2)
        )
        for one, other in zip(alone, helped, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_record_says_what_was_trained_on(make, write):
    data = make(write([*pairs(30), "{"]), skip_bad_rows=str(write([], "bad.jsonl")))
    record = data.record
    assert record["rows"] == 31
    assert record["rejected"] == 1
    assert record["problems"] == {"unreadable": 1}
    assert record["split_by"] == {"by": "content", "seed": 0, "shares": {"validation": 0.05}}
    assert record["settings"]["encoding"]["max_length"] == 256
    assert len(record["key"]) == 32


def test_packing_outside_a_known_model_is_refused(make, write):
    data = make(write(pairs(30)), packing=True)
    demo = import_module(f"{ROOTS[1]}.demos.boring_classes").BoringModel()
    with pytest.raises(NotImplementedError, match="needs a transformers model inside BoringModel"):
        trainer_of().fit(demo, data)


def test_rows_that_do_not_fit_stop_a_run_before_its_first_step(make, write):
    data = make(write([*pairs(30), "{"]))
    task = bind_to_lightning(CausalLM, ROOTS[1])(str(BASE), dtype="float32")
    trainer = trainer_of()
    with pytest.raises(ConfigError, match="row 31 is cut off after"):
        trainer.fit(task, data)
    assert trainer.global_step == 0


def test_resuming_on_other_data_warns(make, write, tmp_path, caplog):
    def run(data, **fit):
        caplog.clear()
        steps = {"max_steps": -1, "max_epochs": 1 + bool(fit), "limit_train_batches": 2}
        trainer = trainer_of(limit_val_batches=0, **steps)
        trainer.fit(bind_to_lightning(CausalLM, ROOTS[1])(str(BASE), dtype="float32"), data, **fit)
        trainer.save_checkpoint(tmp_path / "one.ckpt")
        return "trained on other data" in caplog.text

    path = write(pairs(30))
    assert not run(make(path))
    assert not run(make(path, batch_size=2), ckpt_path=tmp_path / "one.ckpt")
    other = make(path, system_prompt="Be brief.")
    assert run(other, ckpt_path=tmp_path / "one.ckpt")
    caplog.clear()
    task = bind_to_lightning(CausalLM, ROOTS[1])(str(BASE), dtype="float32")
    trainer_of(limit_val_batches=1).validate(task, make(path), ckpt_path=tmp_path / "one.ckpt")
    assert "may be among those that it was trained on" in caplog.text
