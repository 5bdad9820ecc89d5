"""Who speaks is who was chosen: the base, or one of its adapters, as they are without this room."""

import json
from pathlib import Path

import pytest
import torch
from finished import BASE, adapter_in
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lightning_peft import engine
from lightning_peft.chat.chat_model import ChatModel
from lightning_peft.chat.conversation import Conversation, is_command, question_of
from lightning_peft.chat.sampling import Sampling
from lightning_peft.errors import BaseMismatchError, ConfigError, UnsupportedError
from lightning_peft.export.adapters import Adapter, find_adapters
from lightning_peft.export.base import find_base
from lightning_peft.export.loading import load_with_adapters

QUESTION = [{"role": "user", "content": "What does `len` do?"}]
CPU = torch.device("cpu")


def chat_model(*adapters, tokens=12, template="plain", **options):
    found = find_adapters(adapters)
    loaded = load_with_adapters(find_base(str(BASE)), found, device=CPU, **options)
    return ChatModel(loaded, found, template, Sampling(max_new_tokens=tokens))


def greedy(model, ids, tokenizer, tokens=12):
    out = model.eval().generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=tokens,
        pad_token_id=0,
    )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_base_and_adapter_say_what_they_say_in_transformers_and_peft(lora_run):
    talk = chat_model(str(lora_run))
    assert talk.names == ["base", talk.active]
    pieces = []
    tuned = talk.answer(QUESTION, pieces.append)
    assert "".join(pieces).strip() == tuned.text
    assert len(pieces) > 1
    talk.switch("base")
    base = talk.answer(QUESTION)
    plain = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    ids, tokenizer = talk.tokens_of(QUESTION), talk.loaded.tokenizer
    assert base.text == greedy(plain, ids, tokenizer)
    theirs = PeftModel.from_pretrained(plain, adapter_in(lora_run))
    assert tuned.text == greedy(theirs, ids, tokenizer)
    assert tuned.text != base.text
    talk.switch(talk.names[1])
    assert talk.answer(QUESTION).text == tuned.text


def test_bits_are_those_in_training_or_requested(qlora_run, lora_run):
    trained = chat_model(str(qlora_run))
    assert not trained.loaded.notes
    (entry,) = engine.require_record(trained.loaded.model).parts.values()
    assert len(entry.quantized) == 28
    dense = chat_model(str(qlora_run), bits=16)
    assert "was trained on a 4-bit base, and this one has 16" in dense.loaded.notes[0]
    (entry,) = engine.require_record(dense.loaded.model).parts.values()
    assert not entry.quantized
    both = chat_model(f"four={qlora_run}", f"full={lora_run}")
    assert both.names == ["base", "four", "full"]
    assert "full was trained on a 16-bit base" in both.loaded.notes[0]
    with torch.no_grad():
        both.switch("four")
        ids = both.tokens_of(QUESTION)
        assert torch.equal(both.loaded.model(ids).logits, trained.loaded.model(ids).logits)


def test_adapters_of_one_name_get_numbers(lora_run):
    first, second = find_adapters([str(lora_run), str(adapter_in(lora_run))])
    assert second.name == f"{first.name}-2"
    # The model without an adapter has that name.
    assert [each.name for each in find_adapters([f"base={lora_run}"] * 2)] == ["base-2", "base-3"]
    with pytest.raises(ConfigError, match="There is no adapter 'lats'; near names"):
        chat_model(str(lora_run)).switch("lats")


def test_another_base_is_refused(lora_run, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(BASE)
    model.model.norm.weight.data[0] += 1
    model.save_pretrained(tmp_path)
    for file in BASE.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    found = find_adapters([str(lora_run)])
    with pytest.raises(BaseMismatchError, match="trained on another base"):
        load_with_adapters(find_base(str(tmp_path)), found, device=CPU)


def test_the_recorded_template_is_used(lora_run, tmp_path):
    jinja = "Q: {{ messages[-1]['content'] }}\nA:"
    folder = adapter_in(lora_run)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    facts = json.loads((folder / "provenance.json").read_text())
    for place in ({"chat_template": jinja}, {"data": {"template": {"name": "x", "text": jinja}}}):
        (tmp_path / "provenance.json").write_text(json.dumps(facts | place))
        talk = chat_model(str(tmp_path), template=None)
        text = talk.loaded.tokenizer.decode(talk.tokens_of(QUESTION)[0])
        assert text == "Q: What does `len` do?\nA:"
        talk.switch("base")
        assert talk.template().text == jinja
    with pytest.raises(ConfigError, match="has no chat template"):
        chat_model(str(lora_run), template=None).template()


def test_old_turns_make_room(lora_run):
    talk = Conversation(chat_model(str(lora_run), tokens=4), system="Be brief.")
    for number in range(12):
        found = talk.ask(f"What does `len` do, and for the {number}th time?", lambda text: None)
    assert found.dropped > 0
    assert found.dropped % 2 == 0
    assert len(talk.turns) == 24
    with pytest.raises(ConfigError, match="the model takes 256 together with its answer"):
        talk.ask("word " * 400, lambda text: None)
    assert len(talk.turns) == 24


def test_commands(lora_run):
    talk = Conversation(chat_model(f"mine={lora_run}", tokens=2))
    talk.ask("hello", lambda text: None)
    assert talk.run_command("/base") == "base answers"
    assert talk.run_command("/adapter mine ") == "mine answers"
    assert talk.run_command("/adapters") == "  base\n* mine"
    assert len(talk.turns) == 2
    assert "/adapter NAME" in talk.run_command("/help")
    talk.run_command("/reset")
    assert talk.turns == []
    assert talk.run_command("/quit") is None
    with pytest.raises(ConfigError, match="There is no command '/adaptr'; near names: /adapter"):
        talk.run_command("/adaptr mine")
    assert [is_command(x) for x in ("/help", "//help", "help")] == [True, False, False]
    assert question_of("//etc") == "/etc"


def test_without_adapters_the_base_speaks():
    talk = chat_model()
    assert talk.names == ["base"]
    plain = AutoModelForCausalLM.from_pretrained(BASE)
    ids = talk.tokens_of(QUESTION)
    assert talk.answer(QUESTION).text == greedy(plain, ids, talk.loaded.tokenizer)


def test_where_no_answer_would_end(lora_run):
    talk = chat_model(str(lora_run))
    talk.loaded.model.generation_config.eos_token_id = None
    talk.loaded.tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="names an end token"):
        talk.answer(QUESTION)


def test_a_classifier_has_nothing_to_say(lora_run):
    (found,) = find_adapters([str(lora_run)])
    found.facts["base"]["class"] = "LlamaForSequenceClassification"
    with pytest.raises(UnsupportedError, match="which generates no text"):
        load_with_adapters(find_base(str(BASE)), [found], device=CPU)


def test_recorded_facts_of_other_programs():
    bare = Adapter("x", Path(), {"base_model_name_or_path": "org/name"}, {})
    assert (bare.base_name, bare.base_revision, bare.bits, bare.chat_template) == (
        "org/name",
        None,
        16,
        None,
    )
