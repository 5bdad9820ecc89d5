"""Pairs, models and Trainers for the tests of tasks that compare two answers."""

import json
from importlib import import_module

from lightning_peft import LoRAStrategy, QLoRAStrategy
from lightning_peft.data.preference import PreferenceData
from lightning_peft.data.prompt_rows import PromptData
from lightning_peft.data.unpaired import UnpairedPreferenceData
from lightning_peft.demo.run import BASE
from lightning_peft.plugin.namespace import ROOTS, bind_to_lightning

CONFIG = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_dropout": 0.0,
}
SAVED = {"modules_to_save": ["lm_head", "layers.1.mlp"]}
SETTINGS = {
    "lora": (LoRAStrategy, {}),
    "lora and trained layers": (LoRAStrategy, SAVED),
    "lora with dropout": (LoRAStrategy, {"lora_dropout": 0.3}),
    "qlora": (QLoRAStrategy, {}),
}


def data_in(folder, root=ROOTS[1], count=24, **options):
    """Returns pairs whose chosen answer can be distinguished from the rejected one."""
    rows = [
        {"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No " + "idea " * (i % 5)}
        for i in range(count)
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"chat_template": "plain", "validation_share": 0.3, "batch_size": 4, **options}
    made = bind_to_lightning(PreferenceData, root)
    return made(str(folder / "pairs.jsonl"), str(BASE), cache_dir=str(folder / "cache"), **given)


def answers_in(folder, count=24, wanted=lambda i: i % 2 == 0, **options):
    rows = [
        {
            "prompt": f"What is {i}?",
            "completion": f"It is {i}." if wanted(i) else "No " + "idea " * (1 + i % 5),
            "label": wanted(i),
        }
        for i in range(count)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"chat_template": "plain", "validation_share": 0.3, "batch_size": 4, **options}
    made = bind_to_lightning(UnpairedPreferenceData, ROOTS[1])
    return made(str(folder / "rows.jsonl"), str(BASE), cache_dir=str(folder / "cache"), **given)


def prompts_in(folder, count=12, **options):
    rows = [{"prompt": "What is " + "very " * (i % 4) + f"{i}?"} for i in range(count)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"chat_template": "plain", "validation_share": 0.3, "batch_size": 2, **options}
    made = bind_to_lightning(PromptData, ROOTS[1])
    return made(str(folder / "rows.jsonl"), str(BASE), cache_dir=str(folder / "cache"), **given)


def trainer_of(strategy="auto", root=ROOTS[1], **options):
    """Returns a Trainer for three quiet steps on the CPU."""
    given = {"max_steps": 3, "logger": False, "enable_checkpointing": False, **options}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return import_module(root).Trainer(strategy=strategy, devices=1, **quiet, **given)


def strategy_of(kind, **more):
    """Returns the strategy of one of ``SETTINGS``."""
    made, options = SETTINGS[kind]
    return made(r=4, lora_alpha=64, announce=False, **options, **more)
