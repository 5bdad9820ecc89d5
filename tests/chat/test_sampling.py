"""How tokens are chosen, and what ends an answer."""

import pytest
import torch
from finished import BASE
from transformers import AutoTokenizer, GenerationConfig

from lightning_peft.chat.chat_model import ChatModel
from lightning_peft.chat.sampling import Sampling, broken_rules
from lightning_peft.chat.streaming import AnswerStreamer, StopTexts
from lightning_peft.export.base import find_base
from lightning_peft.export.loading import load_with_adapters

QUESTION = [{"role": "user", "content": "What does `len` do?"}]


@pytest.fixture(scope="module")
def talk():
    loaded = load_with_adapters(find_base(str(BASE)), [], device=torch.device("cpu"))
    return ChatModel(loaded, [], "plain")


def answered(talk, **values):
    talk.sampling = Sampling(max_new_tokens=16, **values)
    pieces = []
    torch.manual_seed(3)
    found = talk.answer(QUESTION, pieces.append)
    # What is written is the answer, whatever is held back on the way.
    assert "".join(pieces).strip() == found.text
    return found.text, found.ended, pieces


def test_what_is_drawn_from(talk):
    greedy, *_ = answered(talk)
    assert answered(talk, temperature=5.0, top_k=1)[0] == greedy
    assert answered(talk, temperature=5.0)[0] != greedy
    # A config in the folder of the base changes nothing.
    model = talk.loaded.model
    before = model.generation_config
    likeliest = talk.loaded.tokenizer(greedy, add_special_tokens=False)["input_ids"]
    model.generation_config = given = GenerationConfig(
        repetition_penalty=1.8, min_p=0.99, suppress_tokens=likeliest, no_repeat_ngram_size=1
    )
    try:
        assert answered(talk)[0] == greedy
        assert talk.answers([QUESTION])[0].text == greedy
        # A minimum share would leave the likeliest token alone.
        assert answered(talk, temperature=5.0)[0] != greedy
        penalized, *_ = answered(talk, repetition_penalty=1.8)
        assert model.generation_config is given
    finally:
        model.generation_config = before
    assert penalized != greedy
    ids = talk.tokens_of(QUESTION)
    options = {"do_sample": False, "max_new_tokens": 16, "pad_token_id": 0}
    theirs = talk.loaded.model.generate(
        ids, attention_mask=torch.ones_like(ids), repetition_penalty=1.8, **options
    )
    new = theirs[0, ids.shape[1] :]
    assert talk.loaded.tokenizer.decode(new, skip_special_tokens=True).strip() == penalized
    # Several at a time are those alone, where padding would count as part of a prompt.
    other = [{"role": "user", "content": "And what is the sum of several numbers?"}]
    assert [one.text for one in talk.answers([QUESTION, other])] == [
        talk.answer(QUESTION).text,
        talk.answer(other).text,
    ]


def test_a_stop_text_ends_an_answer_before_it(talk):
    whole, *_ = answered(talk)
    words = whole.split(" ")
    stop = f"{words[2]} {words[3][:1]}"
    text, ended, _ = answered(talk, stop=(stop, "not there at all"))
    assert text == whole[: whole.index(stop)].strip()
    assert ended
    assert talk.answers([QUESTION])[0].text == text
    text, ended, pieces = answered(talk, stop=("not there",))
    assert (text, ended) == (whole, answered(talk)[1])
    assert len(pieces) > 1


@pytest.mark.parametrize("put_first", [True, False])
@pytest.mark.parametrize(
    ("said", "stop", "answer"),
    [
        ("a ## b c ### d", ("###", "End"), "a ## b c "),
        ("a ## b", ("###",), "a ## b"),
        ("It is Paris.</s>user more", ("</s>user",), "It is Paris."),
        ("It is Paris.</s>user more", ("</s>u",), "It is Paris."),
        ("It is</s> Paris.</s></s> End", ("never", "is.</s>"), "It is Par"),
        ("It</s> is.</s>more", ("s>more",), "It is."),
    ],
)
def test_an_answer_is_written_up_to_a_stop_text(put_first, said, stop, answer):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    special = tokenizer.eos_token
    stop = tuple(one.replace("</s>", special).replace("s>m", f"{special[-2:]}m") for one in stop)
    tokens = tokenizer(said.replace("</s>", special), add_special_tokens=False)["input_ids"]
    pieces = []
    criterion = StopTexts(tokenizer, stop, 1)
    streamer = AnswerStreamer(tokenizer, pieces.append, criterion)
    known = torch.tensor([[5]])
    streamer.put(known)
    for token in map(torch.tensor, tokens):
        known = torch.cat([known, token.reshape(1, 1)], 1)
        # Versions of transformers differ in the order.
        if put_first:
            streamer.put(token.reshape(1))
        criterion(known, None)
        if not put_first:
            streamer.put(token.reshape(1))
        if criterion.found:
            break
    streamer.end()
    assert "".join(pieces) == streamer.text == answer
    assert criterion.found == (answer != said)


def test_a_stop_text_may_be_a_special_token_and_lies_in_the_answer():
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    special = tokenizer.eos_token
    ids = tokenizer("Stop here", add_special_tokens=False, return_tensors="pt")["input_ids"]
    criterion = StopTexts(tokenizer, ("Stop",), ids.shape[1])
    assert not criterion(ids, None).any()
    more = torch.cat([ids, torch.tensor([[tokenizer.eos_token_id]])], 1)
    criterion = StopTexts(tokenizer, (special,), ids.shape[1])
    assert not criterion(ids, None).any()
    assert criterion(more, None).all()
    assert criterion.found


def test_values_that_cannot_be():
    good = {"max_new_tokens": 1, "temperature": 0, "top_p": 1, "top_k": 0, "stop": ["x"]}
    assert broken_rules({**good, "repetition_penalty": 0.5, "other": None}) == {}
    bad = {"max_new_tokens": 0, "temperature": -1, "top_p": 0, "top_k": 1.5, "stop": ["x", ""]}
    assert broken_rules({**bad, "repetition_penalty": 0}) == {
        "max_new_tokens": "a whole number, 1 at least",
        "temperature": "0 or more",
        "top_p": "more than 0, and at most 1",
        "top_k": "a whole number, 0 at least",
        "repetition_penalty": "more than 0",
        "stop": "a list of texts that are not empty",
    }
    assert set(broken_rules({"top_k": True, "stop": "x", "temperature": float("nan")})) == {
        "top_k",
        "stop",
        "temperature",
    }
