"""Pairs, models and Trainers for the tests of tasks that compare two answers."""

import json
from importlib import import_module

import torch
from trainer_fixtures import QUIET

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


def _made(cls, folder, rows, root=ROOTS[1], **options):
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"chat_template": "plain", "validation_share": 0.3, "batch_size": 4, **options}
    files = {"tokenizer": str(BASE), "cache_dir": str(folder / "cache")}
    return bind_to_lightning(cls, root)(str(folder / "rows.jsonl"), **files, **given)


def data_in(folder, root=ROOTS[1], count=24, **options):
    """Returns pairs whose chosen answer can be distinguished from the rejected one."""
    rows = [
        {"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No " + "idea " * (i % 5)}
        for i in range(count)
    ]
    return _made(PreferenceData, folder, rows, root, **options)


def answers_in(folder, count=24, wanted=lambda i: i % 2 == 0, **options):
    rows = [
        {
            "prompt": f"What is {i}?",
            "completion": f"It is {i}." if wanted(i) else "No " + "idea " * (1 + i % 5),
            "label": wanted(i),
        }
        for i in range(count)
    ]
    return _made(UnpairedPreferenceData, folder, rows, **options)


def prompts_in(folder, count=12, **options):
    rows = [{"prompt": "What is " + "very " * (i % 4) + f"{i}?"} for i in range(count)]
    return _made(PromptData, folder, rows, **{"batch_size": 2, **options})


def trainer_of(strategy="auto", root=ROOTS[1], **options):
    """Returns a Trainer for three quiet steps on the CPU."""
    given = {"max_steps": 3, "enable_checkpointing": False, **QUIET, **options}
    return import_module(root).Trainer(strategy=strategy, devices=1, accelerator="cpu", **given)


def strategy_of(kind, **more):
    """Returns the strategy of one of ``SETTINGS``."""
    made, options = SETTINGS[kind]
    return made(r=4, lora_alpha=64, announce=False, **options, **more)


def alone(model, batch, name=""):
    """Returns the log-probability of each answer, one row at a time, without padding."""
    found = []
    for ids, mask, labels in zip(
        *(batch[f"{name}{one}"] for one in ("input_ids", "attention_mask", "labels")), strict=True
    ):
        length = int(mask.sum())
        logits = model(input_ids=ids[None, :length]).logits[0].log_softmax(-1)
        places = [place for place in range(1, length) if labels[place] != -100]
        found.append(sum(logits[place - 1, ids[place]] for place in places))
    return torch.stack(found)
