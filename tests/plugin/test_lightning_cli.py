"""LightningCLI: strategies and callbacks in YAML, by class path or by name."""

from __future__ import annotations

import logging
import sys
import textwrap

import pytest
import torch
import yaml
from modules import ROOTS, lightning, loader, task_class

from lightning_peft import LoRAStrategy, QLoRAStrategy, engine, load_from_checkpoint
from lightning_peft.errors import CheckpointError, ConfigError
from lightning_peft.plugin.lightning_cli import lightning_command
from lightning_peft.plugin.namespace import namespace, namespace_of

LORA = {
    "r": 8,
    "lora_alpha": 12,
    "lora_dropout": 0.1,
    "target_modules": ["layers.0", "layers.1"],
    "exclude_modules": ["head"],
    "modules_to_save": ["norm"],
    "use_rslora": True,
    "use_dora": False,
    "init_lora_weights": "gaussian",
    "rank_pattern": {"layers.1": 2},
    "alpha_pattern": {"layers.1": 3},
    "layers_to_transform": None,
    "bias": "lora_only",
    "adapt": ["model"],
    "optimizer": "adamw_8bit",
    "gradient_checkpointing": "auto",
    "announce": False,
    "verify": "full",
    "ddp_kwargs": {"find_unused_parameters": True},
}
QUANTIZATION = {
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
    "bnb_4bit_compute_dtype": "bfloat16",
}
ARGUMENTS = {"LoRAStrategy": LORA, "QLoRAStrategy": {**LORA, **QUANTIZATION}}
TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def make_cli(root, arguments, **given):
    """Returns a LightningCLI of one tree; ``arguments`` is a command line or a config."""
    task = task_class(root)

    class Data(lightning(root).LightningDataModule):
        def train_dataloader(self):
            return loader()

    cli = sys.modules.get(f"{root}.cli") or __import__(f"{root}.cli", fromlist=["cli"])
    settings = {"save_config_callback": None, "run": False, **given}
    with namespace(root):
        return cli.LightningCLI(task, Data, args=arguments, **settings)


def written(folder, config):
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({"trainer": {**TRAINER, **config}}))
    return file


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_all_arguments_of_a_strategy(name, root, tmp_path, capsys):
    strategy = {"class_path": f"lightning_peft.{name}", "init_args": ARGUMENTS[name]}
    file = written(tmp_path, {"strategy": strategy})
    # The command prints what it read, and reads what it printed.
    with pytest.raises(SystemExit):
        make_cli(root, ["--config", str(file), "--print_config"])
    printed = capsys.readouterr().out
    again = tmp_path / "again.yaml"
    again.write_text(printed)
    with pytest.raises(SystemExit):
        make_cli(root, ["--config", str(again), "--print_config"])
    assert capsys.readouterr().out == printed
    shown = yaml.safe_load(printed)["trainer"]["strategy"]["init_args"]
    assert {key: shown[key] for key in ARGUMENTS[name]} == ARGUMENTS[name]

    cli = make_cli(root, ["--config", str(again)])
    made = cli.trainer.strategy
    assert namespace_of(made) == root
    assert isinstance(made, {"LoRAStrategy": LoRAStrategy, "QLoRAStrategy": QLoRAStrategy}[name])
    cli.trainer.fit(cli.model, cli.datamodule)
    entry = engine.require_record(cli.model).parts["model"]
    config = entry.adapters["default"].config
    assert (config["r"], config["lora_alpha"], config["bias"]) == (8, 12, "lora_only")
    assert config["rank_pattern"] == {"layers.1": 2}
    assert made.ddp_kwargs == {"find_unused_parameters": True}
    if name == "QLoRAStrategy":
        assert entry.quantization["bnb_4bit_quant_type"] == "fp4"
        assert entry.quantization["bnb_4bit_compute_dtype"] == "bfloat16"


@pytest.mark.parametrize("root", ROOTS)
def test_ready_configs_as_their_fields(root, tmp_path):
    arguments = {
        "peft_config": {"peft_type": "LOHA", "r": 3, "target_modules": ["layers.0"]},
        "quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "announce": False,
    }
    strategy = {"class_path": "lightning_peft.QLoRAStrategy", "init_args": arguments}
    cli = make_cli(root, ["--config", str(written(tmp_path, {"strategy": strategy}))])
    injection = cli.trainer.strategy.lifecycle.injection
    assert (injection.peft_config.peft_type, injection.peft_config.r) == ("LOHA", 3)
    assert injection.quantization_config.bnb_4bit_quant_type == "nf4"


@pytest.mark.parametrize("root", ROOTS)
def test_by_name_and_on_the_command_line(root):
    flags = [f"--trainer.{key}={str(value).lower()}" for key, value in TRAINER.items()]
    cli = make_cli(root, [*flags, "--trainer.strategy=qlora"])
    assert isinstance(cli.trainer.strategy, QLoRAStrategy)
    assert namespace_of(cli.trainer.strategy) == root
    cli = make_cli(
        root,
        [*flags, "--trainer.strategy=lightning_peft.LoRAStrategy", "--trainer.strategy.r=5"],
    )
    assert cli.trainer.strategy.lifecycle.injection.peft_config.r == 5


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("name", ["LoRACallback", "QLoRACallback"])
def test_callbacks(name, root, tmp_path):
    callback = {
        "class_path": f"lightning_peft.{name}",
        "init_args": {"r": 2, "announce": False},
    }
    cli = make_cli(root, ["--config", str(written(tmp_path, {"callbacks": [callback]}))])
    made = next(c for c in cli.trainer.callbacks if type(c).__name__ == name)
    assert isinstance(made, lightning(root).Callback)
    cli.trainer.fit(cli.model, cli.datamodule)
    assert engine.require_record(cli.model).active == ("default",)


@pytest.mark.parametrize(
    ("values", "messages"),
    [
        ({"r": "many"}, ["r", "many"]),
        ({"bias": "some"}, ["bias", "some"]),
        ({"rank": 4}, ["rank"]),
        ({"bnb_4bit_quant_type": "int3"}, ["bnb_4bit_quant_type", "int3"]),
        ({"r": 0}, ["r=0: the rank is a positive integer"]),
        ({"lora_dropout": 1.5}, ["lora_dropout=1.5"]),
    ],
)
def test_a_wrong_value_is_named(values, messages, tmp_path, capsys):
    strategy = {"class_path": "lightning_peft.QLoRAStrategy", "init_args": values}
    file = written(tmp_path, {"strategy": strategy})
    with pytest.raises((SystemExit, ValueError)) as caught:
        make_cli(ROOTS[0], ["--config", str(file)])
    text = capsys.readouterr().err + str(caught.value)
    assert all(message in text for message in messages), text


def test_types_are_the_reason_where_nothing_else_is_wrong():
    # As jsonargparse raises it.
    union = (
        "Does not validate against any of the Union subtypes\nSubtypes: [<class 'int'>]\nErrors:\n"
        "  - Expected a <class 'int'>\nGiven value type: <class 'str'>\nGiven value: x"
    )
    nested = f"Problem with given class_path 'a.B':\n{textwrap.indent(union, '  ')}"
    for text, cause in (
        (union, "Expected a <class 'int'>"),
        (nested, "Problem with given class_path 'a.B':\n      - Expected a <class 'int'>"),
    ):
        with pytest.raises(ConfigError) as caught, lightning_command([]):
            raise ValueError(text)
        assert str(caught.value) == f"Cannot instantiate the config: {cause}"


@pytest.mark.parametrize("root", ROOTS)
def test_a_checkpoint_of_the_cli_loads_again(root, tmp_path):
    """LightningCLI saves hyperparameters as they are in YAML."""
    strategy = {"class_path": "lightning_peft.LoRAStrategy", "init_args": {"r": 2}}
    config = {"strategy": strategy, "default_root_dir": str(tmp_path)}
    cli = make_cli(root, ["--config", str(written(tmp_path, config)), "--model.lr=0.07"])
    cli.trainer.fit(cli.model, cli.datamodule)
    file = tmp_path / "one.ckpt"
    cli.trainer.save_checkpoint(file)
    content = torch.load(file, weights_only=True)
    assert content["hyper_parameters"]["_instantiator"] == f"{root}.cli.instantiate_module"
    assert load_from_checkpoint(task_class(root), file).lr == 0.07
    # A file cannot choose which class is imported and made.
    content["hyper_parameters"]["_class_path"] = "antigravity.Anything"
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=r"'antigravity\.Anything', which is not an imported"):
        load_from_checkpoint(task_class(root), file)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    ("given", "value"),
    [("true", True), ("false", False), ("auto", "auto"), ("0.5", 0.5), ("2GB", "2GB")],
)
def test_gradient_checkpointing_has_several_kinds_of_values(given, value):
    flags = [f"--trainer.{key}={str(value).lower()}" for key, value in TRAINER.items()]
    strategy = "--trainer.strategy=lightning_peft.QLoRAStrategy"
    cli = make_cli(
        ROOTS[0], [*flags, strategy, f"--trainer.strategy.gradient_checkpointing={given}"]
    )
    read = cli.trainer.strategy.lifecycle.injection.gradient_checkpointing
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("verbose", [False, True])
def test_lines_of_no_use_are_kept_from_the_log(verbose, said):
    noise = ["💡 Tip: try litlogger", "TPU available: False, using: 0 TPU cores"]
    with lightning_command([], verbose=verbose):
        for root in ROOTS:
            for line in [*noise, f"GPU available: False, by {root}"]:
                logging.getLogger(f"{root}.utilities.rank_zero").info(line)
    logging.getLogger(f"{ROOTS[0]}.utilities.rank_zero").info("Tip: afterwards")
    useful = [f"GPU available: False, by {root}" for root in ROOTS]
    shown = [text for text in said if "available" in text or "Tip" in text]
    assert [text for text in shown if text in useful] == useful
    assert shown[-1] == "Tip: afterwards"
    assert (len(shown) == 3) is not verbose
