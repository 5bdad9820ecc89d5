import json
from functools import partial

import pytest
import torch
from models import llama_config
from transformers import AutoTokenizer, LlamaForCausalLM

from lightning_peft.data.supervised import SupervisedData
from lightning_peft.demo.run import BASE
from lightning_peft.errors import ConfigError
from lightning_peft.plugin.namespace import ROOTS, bind_to_lightning

# Settings of data with the demo's tokenizer: for conversations, and to train on all rows.
TALKS = {"tokenizer": str(BASE), "chat_template": "plain", "batch_size": 4}
ALL_ROWS = {"tokenizer": str(BASE), "batch_size": 4, "validation_share": 0}


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
def build(tmp_path):
    """Makes a data module of a class, with a cache of its own."""

    def build(cls, data, root=ROOTS[1], **options):
        options = {"cache_dir": str(tmp_path / "cache"), **options}
        return bind_to_lightning(cls, root)(str(data), **options)

    return build


@pytest.fixture
def make(build):
    """Makes data for supervised training."""
    return partial(build, SupervisedData, **TALKS)


@pytest.fixture
def bert(tmp_path):
    """A tokenizer with a few word pieces, which marks two texts and drops what is not text."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abf", "##b", "##c", *"cde"]
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words))
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 16}
    (tmp_path / "bert" / "tokenizer_config.json").write_text(json.dumps(settings))
    AutoTokenizer.from_pretrained(tmp_path / "bert").save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


def refusal(data):
    """Returns the message with which data is refused before a run."""
    with pytest.raises(ConfigError) as error:
        data.setup("fit")
    return str(error.value)


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
    folder = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(llama_config(vocab_size=4096)).save_pretrained(folder)
    return str(folder)
