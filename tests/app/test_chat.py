"""The model process: who gets it, how it ends, and what is asked of it and voted on."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest

from gradio_app.chat import command, request, votes
from gradio_app.chat.prompts import (
    HeldOutPrompt,
    SystemPrompt,
    extract_question,
    held_out_prompts,
    labels,
    scored_rows,
    system_prompt,
)
from gradio_app.chat.sessions import AnswerChunk, ChatSessions, Timeouts
from gradio_app.errors import UserError
from gradio_app.pages.run.conversation import (
    ChatInputs,
    Conversation,
    Question,
    opened_row,
    parse_request,
    saved_row,
    stream_answers,
    without_last,
)
from gradio_app.pages.run.score import checked_rows
from gradio_app.runs.run_task import task_of_run
from gradio_app.runs.store import RunStore
from gradio_app.runs.types import Run
from gradio_app.settings import Settings
from gradio_app.texts import LANGUAGES, Texts
from lightning_peft.chat.answer_scores import summarize_rows
from lightning_peft.runs.status import write_json
from lightning_peft.task_registry import TASKS
from tests.app.runs import save_adapter, settings, until

FAKE = str(Path(__file__).with_name("fake_chat_server.py"))
USUAL = request.Sampling()


def with_adapters(
    store: RunStore, owner: str = "local", loading: str = "", **config: object
) -> Run:
    run = store.create(owner, "seed_everything: 0\n", "Mine")
    for name, step in (("best", 4), ("last", 8)):
        adapter = save_adapter(run.folder, name, step, **config)
        if loading:
            (adapter / "fake.json").write_text(json.dumps({"loading": loading}))
    return store.get(owner, run.id)


@pytest.fixture
def given(tmp_path: Path) -> Settings:
    return settings(tmp_path, max_concurrent_runs=0)


@pytest.fixture
def store(given: Settings) -> RunStore:
    return RunStore(given)


@pytest.fixture
def speak(given: Settings) -> Iterator[Callable[..., ChatSessions]]:
    made: list[ChatSessions] = []

    def make(
        using: Callable[[], Run | None] = lambda: None, space: bool = False, **timeouts: float
    ) -> ChatSessions:
        fake = replace(given, command=(sys.executable, FAKE), space=space)
        made.append(ChatSessions(fake, using, Timeouts(**timeouts)))
        return made[-1]

    yield make
    for one in made:
        one.close()


def loaded(speakers: ChatSessions, run: Run, *checkpoints: str) -> None:
    for _ in speakers.load(run.owner, run, *(checkpoints or ["best"])):
        pass


def ask(
    speakers: ChatSessions, run: Run, question: str = "Hello", who: str | None = "best"
) -> AnswerChunk:
    messages = request.build_messages("", [request.user_turn(question)])
    *_, last = speakers.answer(run.owner, run, who, messages, USUAL)
    return last


def started(run: Run, checkpoint: str = "best") -> dict:
    file = run.folder.checkpoints / "adapters" / checkpoint / "started.json"
    return json.loads(file.read_text())


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def refused(key: str) -> pytest.RaisesExc:
    return pytest.raises(UserError, match=rf"^playground\.{key}")


def test_it_loads_answers_and_is_unloaded(speak, store):
    speakers, run = speak(), with_adapters(store)
    seen = list(speakers.load("local", run, "best"))
    assert seen[0].phase == "loading"
    assert any(one.what == "loading the model" for one in seen)
    assert seen[-1].phase == "ready"
    assert seen[-1].memory_bytes > 1_000_000
    assert seen[-1].notes == ("a note",)
    messages = request.build_messages("Be kind", [request.user_turn("Hello")])
    pieces = list(speakers.answer("local", run, "best", messages, USUAL))
    assert all(later.text.startswith(piece.text) for piece, later in pairwise(pieces))
    assert not any(piece.done for piece in pieces[:-1])
    last = pieces[-1]
    assert last == AnswerChunk("checkpoint-1 heard Hello", True, 3, True, False, 0, last.seconds)
    assert 0 < last.seconds < 60
    assert ask(speakers, run, who=None).text == "base heard Hello"
    # Another checkpoint of the same run is there already, another process is not needed.
    pid = started(run)["pid"]
    assert list(speakers.load("local", run, "last")) == []
    assert ask(speakers, run, who="last").text == "checkpoint-2 heard Hello"
    assert not gone(pid)
    speakers.unload("local")
    assert speakers.model_status("local").phase == "none"
    until(lambda: gone(pid))
    with refused("was_unloaded"):
        ask(speakers, run)


def test_what_the_process_is_reported_and_sees(speak, store, monkeypatch):
    monkeypatch.setenv("MY_PASSWORD", "secret")
    run = with_adapters(store)
    loaded(speak(), run)
    message = started(run)
    folder = run.folder.checkpoints / "adapters"
    assert message["words"] == [
        "chat",
        "--serve",
        f"checkpoint-1={folder / 'best'}",
        f"checkpoint-2={folder / 'last'}",
    ]
    assert "MY_PASSWORD" not in message["environment"]
    assert message["environment"]["PYTHONSAFEPATH"] == "1"


def test_adapters_with_whole_layers_are_loaded_one_at_a_time(speak, store):
    speakers, run = speak(), with_adapters(store, modules_to_save=["lm_head"])
    loaded(speakers, run, "best")
    assert len(started(run)["words"]) == 3
    loaded(speakers, run, "last")
    assert ask(speakers, run, who="last").text == "checkpoint-1 heard Hello"
    assert gone(started(run)["pid"])
    with refused("refused_together"):
        loaded(speakers, run, "best", "last")


def test_a_checkpoint_answers_in_place_of_the_base(speak, store):
    speakers, run = speak(), with_adapters(store)
    values = ("best", "Be kind", 0, 1, 8, 0, 0, 1, "", "last")
    asked = parse_request(run, "Hello", ChatInputs("both", *values))
    assert asked.names == ["best", "last"]
    loaded(speakers, run, *asked.names)
    *_, talk = stream_answers(speakers, run, Conversation(), asked)
    said = [turns[-1]["content"] for turns in (talk.left, talk.right)]
    assert said == ["checkpoint-2 heard Hello", "checkpoint-1 heard Hello"]
    # Another pair begins a conversation of its own; votes are for the base.
    again = parse_request(run, "Hello", ChatInputs("both", *values[:-1]))
    *_, other = stream_answers(speakers, run, talk, again)
    assert [one["content"] for one in other.left] == ["Hello", "base heard Hello"]
    assert parse_request(run, "Hello", ChatInputs("blind", *values)).other is None


def test_a_saved_conversation_is_a_row_and_goes_on(speak, store, tmp_path):
    speakers, run = speak(), with_adapters(store)
    asked = parse_request(
        run, "Größe?", ChatInputs("both", "best", "Be kind", 0, 1, 8, 0, 0, 1, "")
    )
    loaded(speakers, run)
    *_, talk = stream_answers(speakers, run, Conversation(), asked)
    file = tmp_path / "conversation.jsonl"
    file.write_text(saved_row(talk, "Be kind"), encoding="utf-8")
    system = {"role": "system", "content": "Be kind"}
    assert json.loads(file.read_text("utf-8")) == {"messages": [system, *talk.right]}
    system_prompt, opened = opened_row(file)
    assert (system_prompt, opened.left, opened.right) == ("Be kind", talk.right, talk.right)
    *_, more = stream_answers(speakers, run, opened, asked)
    assert [one["role"] for one in more.right] == ["user", "assistant"] * 2
    with refused("refused_save"):
        saved_row(Conversation(), "")
    bad = ["", "[]", '{"messages": 7}', '{"messages": [{"role": "user", "content": "a"}]}', "\xff"]
    for text in bad:
        file.write_text(text, encoding="latin-1")
        with refused("refused_open"):
            opened_row(file)


def test_there_is_one_process_and_the_next_run_takes_its_place(speak, store):
    speakers, first, second = speak(), with_adapters(store), with_adapters(store)
    loaded(speakers, first)
    loaded(speakers, second)
    assert gone(started(first)["pid"])
    assert not gone(started(second)["pid"])
    with refused("was_unloaded"):
        ask(speakers, first)
    with refused("refused_checkpoint"):
        loaded(speakers, second, "../../other")


def test_an_answer_is_stopped(speak, store):
    speakers, run = speak(), with_adapters(store)
    loaded(speakers, run)
    answer = speakers.answer(
        "local", run, "best", request.build_messages("", [request.user_turn("long")]), USUAL
    )
    next(answer)
    assert speakers.model_status("local").phase == "answering"
    with refused("refused_answering"):
        ask(speakers, run)
    speakers.stop("somebody else")
    speakers.stop("local")
    *_, last = answer
    assert last.stopped
    assert 0 < last.tokens < 2_000
    # One that nobody waits for any more is stopped too, and its rest is nobody's answer.
    answer = speakers.answer(
        "local", run, "best", request.build_messages("", [request.user_turn("long")]), USUAL
    )
    next(answer)
    answer.close()
    assert ask(speakers, run).text == "checkpoint-1 heard Hello"


def scored(*questions: str) -> list[dict]:
    return [
        {"messages": [{"role": "user", "content": text}], "reference": "right"}
        for text in questions
    ]


def test_rows_are_scored_and_the_score_is_stopped(speak, store):
    speakers, run = speak(), with_adapters(store)
    loaded(speakers, run)
    rows = scored("right", "wrong")
    first, *_, last = speakers.score("local", run, "best", rows, USUAL)
    assert (first.total, first.answers, first.rows, first.done) == (4, 0, (), False)
    assert (last.answers, last.done, last.stopped) == (4, True, False)
    found = summarize_rows(last.rows)
    assert list(found) == ["base", "checkpoint-1"]
    assert (found["base"].rows, found["base"].exact) == (2, 1)
    # What is known stays when it is stopped.
    score = speakers.score("local", run, "best", scored("right", "wait", "wrong"), USUAL)
    while not next(score).rows:
        pass
    assert speakers.model_status("local").phase == "answering"
    with refused("refused_answering"):
        ask(speakers, run)
    speakers.stop("local")
    *_, last = score
    assert (last.done, last.stopped, len(last.rows)) == (True, True, 1)
    # One that nobody waits for any more is stopped too.
    score = speakers.score("local", run, "best", scored("wait"), USUAL)
    next(score)
    score.close()
    assert ask(speakers, run).text == "checkpoint-1 heard Hello"


def test_a_score_on_a_space_is_bounded():
    assert checked_rows(100, request.Sampling(max_new_tokens=1_024), space=False) == 100
    assert checked_rows(20, request.Sampling(max_new_tokens=128), space=True) == 20
    with refused("refused_score_rows"):
        checked_rows(21, request.Sampling(max_new_tokens=128), space=True)
    with refused("refused_length"):
        checked_rows(20, request.Sampling(max_new_tokens=129), space=True)


def test_its_end_is_reported_and_survived(speak, store):
    speakers, run = speak(), with_adapters(store)
    for end in ("die", "kill"):
        loaded(speakers, run)
        if end == "kill":
            os.kill(started(run)["pid"], signal.SIGKILL)
        with refused("(died|was_unloaded)"):
            ask(speakers, run, "die")
        # The answer ends a moment before the process does.
        until(lambda: speakers.model_status("local").phase == "none")
    loaded(speakers, run)
    with refused("refused_answer"):
        ask(speakers, run, "fail")
    assert ask(speakers, run).done


def test_one_that_hangs_is_ended(speak, store):
    speakers, run = speak(silence=0.5), with_adapters(store)
    loaded(speakers, run)
    pid = started(run)["pid"]
    with refused("hung"):
        ask(speakers, run, "hang")
    assert gone(pid)
    with refused("hung"):
        loaded(speakers, with_adapters(store, loading="hang"))


def test_what_cannot_be_loaded_is_reported_a_stranger_without_places_and_secrets(
    speak, store, given
):
    speakers = speak(space=True)
    with refused("refused_load") as caught:
        loaded(speakers, with_adapters(store, loading="error"))
    assert "is another one" in str(caught.value)
    assert str(given.runs) not in str(caught.value)
    assert "hf_abc" not in str(caught.value)
    with refused("died_saying") as caught:
        loaded(speakers, with_adapters(store, loading="die"))
    assert caught.value.values["why"] == "no memory is left"


def test_loading_can_be_given_up(speak, store):
    speakers, run = speak(), with_adapters(store, loading="hang")
    loading = speakers.load("local", run, "best")
    next(loading)
    with refused("refused_loading"):
        loaded(speakers, run)
    threading.Timer(0.3, speakers.unload, ["local"]).start()
    with refused("was_unloaded"):
        list(loading)
    # A tab that was closed.
    loading = speakers.load("local", run, "best")
    next(loading)
    loading.close()
    assert speakers.model_status("local").phase == "none"


def test_a_run_has_the_machine_to_itself(speak, store):
    run, active = with_adapters(store), []
    speakers = speak(lambda: next(iter(active), None))
    loaded(speakers, run)
    active.append(run)
    until(lambda: speakers.model_status("local").phase == "none")
    with refused("refused_active .*Mine"):
        loaded(speakers, run)
    # Its name is for its owner.
    assert speakers.reason("somebody else").key == "playground.refused_active_other"


def test_a_run_whose_task_cannot_talk_is_refused(speak, store):
    speakers, run = speak(), with_adapters(store)
    silent = {
        "Forecaster",
        "ImageClassifier",
        "RewardModel",
        "Seq2SeqLM",
        "SpeechRecognizer",
    }
    silent |= {"Reranker", "SentenceEmbedder", "TextClassifier", "TokenClassifier"}
    assert {task.class_name for task in TASKS.values() if not task.chats} == silent
    assert {task.class_name for task in TASKS.values() if task.chats} == {
        "CausalLM",
        "ImageTextToText",
        "PreferenceTuning",
        "RewardTuning",
        "UnpairedPreferenceTuning",
    }
    for kind in sorted(silent):
        known = getattr(import_module("lightning_peft.tasks"), kind)
        write_json(run.folder.provenance, {"task": f"{known.__module__}.{known.__name__}"})
        assert command.unsupported_task(run) == kind
        for language in LANGUAGES:
            assert Texts(language).has(f"playground.silent_{kind}")
    with refused("refused_silent"):
        loaded(speakers, run)
    for task in ("lightning_peft.tasks.causal_lm.CausalLM", "mine.TextClassifier"):
        write_json(run.folder.provenance, {"task": task})
        assert command.unsupported_task(run) == ""
    run.folder.provenance.unlink()
    callback = "trainer:\n  callbacks:\n  - class_path: lightning_peft.tasks.BestCheckpoint\n"
    run.folder.recipe.write_text(
        f"{callback}model:\n  class_path: lightning_peft.tasks.RewardModel\n"
    )
    assert command.unsupported_task(run) == task_of_run(run).class_name == "RewardModel"
    run.folder.recipe.write_text(f"{callback}model:\n  class_path: mine.RewardModel\n")
    assert command.unsupported_task(run) == ""
    assert task_of_run(run) is None


def test_visitors_take_turns(speak, store):
    hers, his = with_adapters(store, "v-1"), with_adapters(store, "v-2")
    speakers = speak(reservation=1.5)
    loaded(speakers, hers)
    with refused("refused_other"):
        loaded(speakers, his)
    assert speakers.model_status("v-2").phase == "none"
    speakers.unload("v-2")
    assert speakers.model_status("v-1").phase == "ready"
    until(lambda: speakers.reason("v-2") is None)
    loaded(speakers, his)
    assert gone(started(hers)["pid"])


def test_it_is_ended_when_it_is_not_used_and_with_the_server(speak, store):
    speakers, run = speak(idle=0.1), with_adapters(store)
    loaded(speakers, run)
    until(lambda: speakers.model_status("local").phase == "none")
    until(lambda: gone(started(run)["pid"]))
    other = speak()
    loaded(other, run)
    other.close()
    assert gone(started(run)["pid"])
    with refused("was_unloaded"):
        loaded(other, run)


# What is asked


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ((3, 1, 10, 0), "temperature"),
        ((float("nan"), 1, 10, 0), "temperature"),
        ((None, 1, 10, 0), "temperature"),
        (("0", 1, 10, 0), "temperature"),
        ((0, 0, 10, 0), "top_p"),
        ((0, 1, 0, 0), "length"),
        ((0, 1, 10**6, 0), "length"),
        ((0, 1, 10, -1), "seed"),
        ((0, 1, 10, True), "seed"),
        ((0, 1, 10, 0, -1), "top_k"),
        ((0, 1, 10, 0, 0, 0), "repetition"),
        ((0, 1, 10, 0, 0, 1, "a\n" * 9), "stop"),
        ((0, 1, 10, 0, 0, 1, "a" * 101), "stop"),
    ],
)
def test_settings_that_cannot_be_are_refused(values, key):
    with refused(f"refused_{key}"):
        request.validate_sampling(*values)


def test_questions_are_checked():
    assert request.validate_sampling(0.5, 0.9, 12.0, 3.0) == request.Sampling(0.5, 0.9, 12, 3)
    asked = request.validate_sampling(0, 1, 12, 0, 40.0, 1.2, "###\n\n\\nUser:\n")
    assert (asked.top_k, asked.repetition_penalty) == (40, 1.2)
    assert asked.stop == ("###", "\nUser:")
    for values in request.PRESETS.values():
        temperature, top_p, top_k, repetition = values
        known = request.validate_sampling(temperature, top_p, 12, 0, top_k, repetition)
        assert (known.temperature, known.top_p) == (temperature, top_p)
        assert (known.top_k, known.repetition_penalty) == (top_k, repetition)
    for text in ("", "  ", None, 3):
        with refused("refused_empty"):
            request.validate_text(text)
    with refused("refused_long"):
        request.validate_text("x" * 20_001)
    assert request.validate_text("", "system") == ""
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}] * 30
    with refused("refused_turns"):
        request.build_messages("", [*turns, request.user_turn("z")])
    asked = request.build_messages("s", [*turns[:2], request.user_turn("z")])
    assert [one["role"] for one in asked] == ["system", "user", "assistant", "user"]


def test_rows_that_were_held_out_are_asked_without_the_template_around_them(store):
    run = with_adapters(store)
    around = ["### User:\n", "\n\n### Assistant:\n"]
    questions = ["What is a?", "What is b?\nIn short.", "Why?"]
    for step in (0, 5):
        for place, question in enumerate([*questions, "One too many"]):
            row = {"step": step, "sample": place, "prompt": question.join(around), "expected": "E"}
            run.folder.append(run.folder.samples, row)
    run.folder.append(run.folder.samples, {"prompt": 3, "expected": None})
    rows = held_out_prompts(run)
    assert [extract_question(row, around) for row in rows] == questions
    assert labels(rows) == questions
    for prompt in ("### System:\nBe kind\n\n### User:\nWhy?\n\n### Assistant:\n", "Why?", ""):
        with refused("refused_row"):
            extract_question(HeldOutPrompt(prompt, "E"), around)
    with refused("refused_row"):
        extract_question(rows[0], None)


def test_rows_whose_turns_are_known_are_asked_as_they_are(store):
    run = with_adapters(store)
    row = {"step": 0, "sample": 0, "prompt": "as text", "expected": "E"}
    run.folder.append(run.folder.samples, row)
    said = [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", " c "), ("assistant", "d")]
    turns = [{"role": role, "content": text} for role, text in said]
    system = {"text": "S", "rows": 4, "of": 9}
    write_json(run.folder.prompts, {"system": system, "held_out": [turns, turns, turns[:3]]})
    first, second = held_out_prompts(run)
    assert (first.system, first.prompt, first.reference) == ("S", " c ", "d")
    assert first.earlier == turns[1:3]
    assert (second.system, second.prompt, second.earlier) == ("S", "a", [])
    assert extract_question(first, None) == " c "
    assert labels([first, second]) == ["c", "a"]
    assert system_prompt(run) == SystemPrompt("S", 4, 9)
    asked = turns[:4]
    short = [turns[0], turns[1]]
    assert scored_rows(run) == [
        {"messages": asked, "reference": "d"},
        {"messages": short, "reference": "b"},
    ]
    assert len(scored_rows(run, 1)) == 1
    # What is not a conversation is passed over, and the samples are there.
    unanswered = [turns[1], {"role": "assistant", "content": ""}]
    strange_rows = [3, [], [{}], turns[:2], unanswered]
    for strange in ({"held_out": strange_rows, "system": 7}, {"system": {"text": 1}}):
        write_json(run.folder.prompts, strange)
        assert [one.prompt for one in held_out_prompts(run)] == ["as text"]
        assert scored_rows(run) == []
        assert system_prompt(run) == SystemPrompt()


def test_the_last_question_is_taken_back():
    def turn(role: str, text: str) -> dict[str, str]:
        return {"role": role, "content": text}

    first = [turn("user", "a"), turn("assistant", "b")]
    left = [*first, turn("user", "c"), turn("assistant", "d")]
    for right in (left, [*first, turn("user", "c")], first):
        shorter, question = without_last(Conversation(left=left, right=right, reference="r"))
        assert (shorter.left, shorter.right, shorter.reference) == (first, first, "")
        assert question == Question("c", ())
    # Of the base alone, there is one column.
    shorter, question = without_last(Conversation(left=first))
    assert (shorter.left, shorter.right, question.text) == ([], [], "a")
    assert without_last(Conversation()) == (Conversation(), Question())


def test_images_go_with_their_questions(speak, store, tmp_path):
    run, speakers = with_adapters(store), speak()
    file, large = tmp_path / "a.png", tmp_path / "b.png"
    file.write_bytes(b"one")
    with large.open("wb") as opened:
        opened.truncate(request.MAX_IMAGE_BYTES)
    inputs = ChatInputs("both", "best", "", 0, 1, 8, 0, 0, 1, "")
    asked = Question("What is it?", request.validate_images([str(file)]))
    with refused("refused_images .*Mine"):
        parse_request(run, asked, inputs)
    write_json(run.folder.provenance, {"task": "lightning_peft.tasks.image_text.ImageTextToText"})
    loaded(speakers, run)
    *_, talk = stream_answers(speakers, run, Conversation(), parse_request(run, asked, inputs))
    assert [turn.get("images") for turn in talk.left] == [[str(file)], None]
    # The fake server writes back what it is shown, here and above.
    assert talk.right[-1]["content"] == "checkpoint-1 heard What is it? b25l"
    assert without_last(talk)[1] == asked
    *_, talk = stream_answers(speakers, run, talk, parse_request(run, "And now?", inputs))
    assert talk.left[-1]["content"] == "base heard And now? b25l"
    with refused("refused_images_size"):
        more = Question("And this?", (str(large),))
        list(stream_answers(speakers, run, talk, parse_request(run, more, inputs)))
    file.unlink()
    with refused("refused_images_gone"):
        list(stream_answers(speakers, run, talk, parse_request(run, "And now?", inputs)))
    with refused("refused_images_many"):
        request.validate_images([str(file)] * 5)
    alone = Question("", (str(file),))
    assert parse_request(run, alone, inputs).question == alone


def test_rows_differ_by_their_images_and_may_be_images_alone(store):
    def row(text: str, image: str) -> list[dict[str, Any]]:
        return [request.user_turn(text, [image]), {"role": "assistant", "content": "A lamp"}]

    run = with_adapters(store)
    asked = [("What?", "MQ=="), ("What?", "Mg=="), ("", "MQ==")]
    write_json(run.folder.prompts, {"held_out": [row(*one) for one in (*asked, asked[0])]})
    rows = held_out_prompts(run)
    assert [(one.prompt, *one.images) for one in rows] == asked
    assert labels(rows) == ["What?", "What?", ""]
    assert extract_question(rows[2], None) == ""
    assert [one["messages"] for one in scored_rows(run)] == [row(*one)[:1] for one in asked]


# Votes


def test_votes_are_kept_with_who_was_who(store):
    run = with_adapters(store)
    ballot = votes.Ballot(
        run.id, "best", "Why?", {"a": "tuned", "b": "base"}, {"a": "So.", "b": "No."}, {"seed": 0}
    )
    outcomes = [votes.record_vote(run, ballot, vote) for vote in ("a", "b", "a", "tie", "both_bad")]
    assert outcomes == ["tuned", "base", "tuned", "tie", "both_bad"]
    rows = [json.loads(line) for line in (run.folder.path / votes.FILE).read_text().splitlines()]
    assert rows[1]["answers"] == {"tuned": "So.", "base": "No."}
    assert rows[1]["shown"] == {"a": "tuned", "b": "base"}
    assert (rows[1]["vote"], rows[1]["outcome"]) == ("b", "base")
    assert votes.count_votes(run, "best") == {"tuned": 2, "base": 1, "tie": 1, "both_bad": 1}
    assert sum(votes.count_votes(run, "last").values()) == 0
    for vote in ("c", "tuned", None, ["a"]):
        with refused("refused_vote"):
            votes.record_vote(run, ballot, vote)
    with refused("refused_vote"):
        votes.record_vote(with_adapters(store), ballot, "a")


def test_a_file_of_votes_does_not_grow_without_end(store, monkeypatch):
    run = with_adapters(store)
    ballot = votes.Ballot(run.id, "best", "?", {"a": "tuned", "b": "base"}, {"a": "", "b": ""})
    votes.record_vote(run, ballot, "a")
    monkeypatch.setattr(votes, "MAX_BYTES", 10)
    with refused("refused_votes"):
        votes.record_vote(run, ballot, "a")


def test_who_is_a_is_chance():
    chance = random.Random(0)
    drawn = [votes.shuffle_sides(chance)["a"] for _ in range(400)]
    assert set(drawn) == {"base", "tuned"}
    assert 150 < drawn.count("base") < 250
    assert set(votes.shuffle_sides().values()) == {"base", "tuned"}


@pytest.mark.parametrize("mode", ["both", "blind"])
def test_a_row_of_the_data_is_asked_again_as_it_is(speak, store, mode):
    run = with_adapters(store)
    said = [("system", " S\n"), ("user", "I am Ann"), ("assistant", "Hi"), ("user", " Who am I?\n")]
    turns = [{"role": role, "content": text} for role, text in [*said, ("assistant", "Ann")]]
    write_json(run.folder.prompts, {"held_out": [turns]})
    speakers = speak()
    loaded(speakers, run)
    inputs = ChatInputs(mode, "best", "another", 0, 1, 8, 0, 0, 1, "")
    asked = parse_request(run, 0, inputs)
    assert asked.system == " S\n"
    *_, first = stream_answers(speakers, run, Conversation(), asked)
    assert [turn["content"] for turn in first.right[:-1]] == ["I am Ann", "Hi", " Who am I?\n"]
    assert first.reference == "Ann"
    shorter, _ = without_last(first)
    assert shorter.row is None
    *_, again = stream_answers(speakers, run, shorter, parse_request(run, first.row, inputs))
    # Blind, the sides are drawn.
    for column in (again.left, again.right):
        assert column[:-1] == first.left[:-1]
    assert again.reference == "Ann"
    *_, other = stream_answers(speakers, run, again, parse_request(run, "What else?", inputs))
    assert (other.row, other.reference) == (None, "")
