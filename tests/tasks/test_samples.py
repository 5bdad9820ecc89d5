from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig

from lightning_peft.demo.run import BASE
from lightning_peft.tasks.samples import BATCH_SIZE, answers
from tests.models import tiny_gpt2, tiny_llama


def mamba():
    config = MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=4)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def task_of(model):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    datamodule = SimpleNamespace(tokenizer=tokenizer)
    return SimpleNamespace(model=model.double(), trainer=SimpleNamespace(datamodule=datamodule))


def rows_of(vocabulary, count):
    torch.manual_seed(1)
    lengths = [3 + (7 * place) % 11 for place in range(count)]
    ids = [torch.randint(3, vocabulary, (length,)).tolist() for length in lengths]
    return [(row, [-100] * (len(row) - 1) + row[-1:]) for row in ids]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, mamba])
def test_answers_of_a_batch_are_those_of_each_prompt_alone(make):
    task = task_of(make())
    calls = []
    task.model.register_forward_pre_hook(
        lambda _, __, inputs: calls.append(inputs["input_ids"].shape), with_kwargs=True
    )
    rows = rows_of(task.model.config.vocab_size, BATCH_SIZE + 3)
    together = answers(task, rows, 6)
    most = max(shape[0] for shape in calls)
    # Padding would change what the recurrent one has read.
    assert most == (2 if make is mamba else BATCH_SIZE)
    assert together == [answers(task, [row], 6)[0] for row in rows]
    assert len({sample.generated for sample in together}) > 3


def test_a_sample_ends_at_the_end_token_or_is_cut():
    task = task_of(tiny_llama())
    rows = rows_of(task.model.config.vocab_size, 2)
    (whole, _) = answers(task, rows, 4)
    assert whole.cut
    tokenizer = task.trainer.datamodule.tokenizer
    with torch.no_grad():
        logits = task.model(torch.tensor([rows[0][0][:-1]])).logits
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(int(logits[0, -1].argmax()))
    (ended, _) = answers(task, rows, 4)
    assert (ended.cut, ended.generated) == (False, "")
