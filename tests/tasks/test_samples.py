from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, MambaConfig

from lightning_peft.demo.run import BASE
from lightning_peft.generation import BATCH_SIZE
from lightning_peft.tasks.rollouts import Sampling, answers_to
from lightning_peft.tasks.samples import answers
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


def test_the_end_tokens_of_the_base_end_answers_too():
    task = task_of(tiny_llama())
    rows = rows_of(task.model.config.vocab_size, 1)
    prompt = torch.tensor([rows[0][0][:-1]])
    with torch.no_grad():
        first = int(task.model(prompt).logits[0, -1].argmax())
    assert answers(task, rows, 4)[0].cut
    batch = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    assert answers_to(task, batch, Sampling(4)).cut.tolist() == [True]
    task.model.generation_config.eos_token_id = [1, first]
    (ended,) = answers(task, rows, 4)
    assert (ended.cut, ended.generated) == (False, "")
    rolled = answers_to(task, batch, Sampling(4))
    assert (rolled.tokens, rolled.cut.tolist()) == ([[first]], [False])


def test_rollouts_are_drawn_from_the_distribution_of_the_loss():
    task = task_of(tiny_llama())
    prompt = torch.tensor([rows_of(task.model.config.vocab_size, 1)[0][0][:-1]])
    batch = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    sampling = Sampling(12, count=4, seed=(9 * 10**18) % 2**63)
    expected = answers_to(task, batch, sampling).tokens
    settings = GenerationConfig(
        min_p=0.9,
        typical_p=0.2,
        top_k=2,
        no_repeat_ngram_size=1,
        epsilon_cutoff=0.5,
        eta_cutoff=0.5,
        repetition_penalty=9.0,
        min_new_tokens=9,
        suppress_tokens=sorted({token for row in expected for token in row}),
    )
    task.model.generation_config = settings
    assert answers_to(task, batch, sampling).tokens == expected
    assert task.model.generation_config is settings
