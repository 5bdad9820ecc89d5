import json

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lightning_peft.data.supervised import SupervisedData
from lightning_peft.demo.run import BASE
from lightning_peft.plugin.namespace import ROOTS, bind_to_lightning


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture
def write(tmp_path):
    """Writes rows as JSON lines; strings are written as they are."""

    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def make(tmp_path):
    """Makes a data module with the demo's tokenizer and a cache of its own."""

    def make(data, root=ROOTS[1], **options):
        options = {"tokenizer": str(BASE), "chat_template": "plain", "batch_size": 4, **options}
        return bind_to_lightning(SupervisedData, root)(
            data, cache_dir=str(tmp_path / "cache"), **options
        )

    return make


def pairs(count, start=0):
    """Returns different prompts and completions of different lengths."""
    return [
        {"prompt": f"What is {i}?", "completion": "It is " + "one more than " * (i % 7) + str(i)}
        for i in range(start, start + count)
    ]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A folder with a Llama of random weights for the demo's tokenizer."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, **sizes, **heads))
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    return str(folder)
