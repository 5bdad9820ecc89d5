"""``chat --serve`` in a process of its own: what another program asks, and what it gets."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any

import pytest
from finished import ROOT

from lightning_peft.chat import protocol
from lightning_peft.chat.answer_scores import score_answer
from lightning_peft.chat.chat_model import Answer
from lightning_peft.chat.sampling import Sampling

SPEAK = ("--chat-template", "plain", "--max-new-tokens", "12")
QUESTION = [{"role": "user", "content": "What does `len` do?"}]


class Client:
    """A program that talks to the command."""

    def __init__(self, *words):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lightning_peft.cli", "chat", *words, "--serve"],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # So that a test can send bytes that are not UTF-8.
            errors="surrogateescape",
        )
        self.loading = []
        while "progress" in (row := self.read()):
            self.loading.append(row["progress"])
        self.ready = row["ready"]

    def read(self):
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        return json.loads(line)

    def send(self, row):
        self.process.stdin.write((row if isinstance(row, str) else json.dumps(row)) + "\n")
        self.process.stdin.flush()

    def ask(self, key, **more):
        self.send({"id": key, "messages": QUESTION, **more})
        return self.answer(key)

    def answer(self, key):
        text = ""
        while "text" in (row := self.read()):
            assert row["id"] == key
            text += row["text"]
        assert row["id"] == key
        return text.strip(), row


@pytest.fixture(scope="module")
def client(lora_run):
    opened = Client(f"mine={lora_run}", *SPEAK)
    yield opened
    opened.process.kill()
    opened.process.wait()
    for stream in (opened.process.stdin, opened.process.stdout, opened.process.stderr):
        stream.close()


def test_it_says_what_it_loads_and_what_is_there(client):
    whats = [one["what"] for one in client.loading]
    assert whats[0] == "loading the libraries"
    assert whats[-1] == "loading the model"
    assert all(one["seconds"] >= 0 for one in client.loading)
    assert client.ready["names"] == ["base", "mine"]
    assert client.ready["active"] == "mine"
    assert client.ready["device"] == "cpu"
    assert client.ready["template"] == "plain"
    assert client.ready["prompt_affixes"] == ["### User:\n", "\n\n### Assistant:\n"]
    # 4.26 million float32 weights of the demo's base, and the adapter's.
    assert client.ready["memory_bytes"] > 4 * 4_000_000


def test_the_stream_is_what_the_command_line_says(client, lora_run, tmp_path, program):
    tuned, done = client.ask(1, adapter="mine")
    assert done == {
        "id": 1,
        "done": True,
        "tokens": done["tokens"],
        "ended": done["tokens"] < 12,
        "stopped": False,
        "dropped": 0,
    }
    base, _ = client.ask("two", adapter="base")
    assert base != tuned
    question = QUESTION[0]["content"]
    lines = f"{question}\n/reset\n/base\n{question}\n"
    words = ("chat", f"mine={lora_run}", *SPEAK, "--json")
    _, shown, _ = program.run(tmp_path, *words, given=lines)
    assert [json.loads(line)["answer"] for line in shown.splitlines()] == [tuned, base]


def test_who_answers_does_not_depend_on_who_did_before(client):
    tuned, _ = client.ask("first")
    client.ask("second", adapter="base")
    again, _ = client.ask("third")
    assert again == tuned == client.ask("fourth", adapter="mine")[0]


def test_the_seed_decides_what_is_drawn(client):
    drawn = {"adapter": "base", "temperature": 1.5, "max_new_tokens": 8}
    first, _ = client.ask(3, seed=1, **drawn)
    again, _ = client.ask(4, seed=1, **drawn)
    other, _ = client.ask(5, seed=2, **drawn)
    assert first == again != other
    # What one request requests is not kept for the next.
    assert client.ask(6, adapter="base")[0] == client.ask(7, adapter="base", temperature=0)[0]


def test_an_answer_is_stopped_and_so_is_one_that_waits(client):
    long = {"adapter": "base", "max_new_tokens": 400, "temperature": 3.0, "messages": QUESTION}
    client.send({"id": 8, **long})
    client.send({"id": 9, **long})
    client.send({"stop": 9})
    assert "text" in client.read()
    client.send({"stop": 8})
    for key, most in ((8, 399), (9, 1)):
        _, done = client.answer(key)
        assert done["stopped"], key
        assert done["tokens"] <= most, key
        assert not done["ended"]
    # One that is not there, and the ids can be used again.
    client.send({"stop": 8})
    _, done = client.ask(8, adapter="mine")
    assert not done["stopped"]


ROWS = [{"messages": QUESTION, "reference": "It counts."}, {"messages": QUESTION}]


def scored(client, key):
    rows, progress = [], []
    while not (row := client.read()).get("done"):
        assert row["id"] == key
        (rows if "row" in row else progress).append(row.get("row") or row["progress"])
    return rows, progress, row


def test_rows_are_answered_by_all_and_scored(client):
    client.send({"id": 21, "rows": ROWS, "max_new_tokens": 5})
    rows, progress, done = scored(client, 21)
    assert done == {"id": 21, "done": True, "stopped": False}
    assert progress[-1] == {"done": 4, "total": 4}
    texts = {name: client.ask(22, adapter=name, max_new_tokens=5)[0] for name in ("base", "mine")}
    assert texts["base"] != texts["mine"]
    for row in rows:
        assert row["answers"] == texts
    expected = {name: asdict(score_answer(text, "It counts.")) for name, text in texts.items()}
    assert rows[0]["scores"] == expected
    assert "scores" not in rows[1]
    assert rows[0]["prompt"] == QUESTION[0]["content"]
    client.send({"id": 23, "rows": ROWS[:1], "adapters": ["mine"], "max_new_tokens": 2})
    (row,), _, _ = scored(client, 23)
    assert row["cut"] == list(row["answers"]) == ["mine"]


def test_a_request_says_how_tokens_are_chosen(client):
    whole, _ = client.ask(31)
    word = whole.split(" ")[1]
    text, done = client.ask(32, stop=[word], top_k=1, temperature=2.0)
    assert text == whole[: whole.index(word)].strip()
    assert done["ended"]
    assert client.ask(33, repetition_penalty=3.0)[0] != whole
    assert client.ask(34)[0] == whole


class SlowToRead:
    """A model that reads its prompts until its server has said twice that it is still there."""

    active, sampling = "base", Sampling()
    tools, variables_override = (), None

    def __init__(self, out):
        self.out, self.names = out, ["base"]

    def switch(self, name):
        pass

    def answers(self, talks, stop):
        end = time.monotonic() + 60
        while self.out.getvalue().count("progress") < 2 and time.monotonic() < end:
            time.sleep(0.01)
        return [Answer("It counts.", 3, ended=True) for _ in talks]


def test_reading_long_prompts_does_not_look_like_a_hang(monkeypatch):
    monkeypatch.setattr(protocol, "_HEARTBEAT_SECONDS", 0.01)
    out = io.StringIO()
    model: Any = SlowToRead(out)
    protocol.Server([], out)._take(model, json.dumps({"id": 1, "rows": ROWS[:1]}))
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line["progress"] for line in lines[:2]] == [{"done": 0, "total": 1}] * 2
    assert lines[-1] == {"id": 1, "done": True, "stopped": False}


def test_a_score_that_waits_is_stopped(client):
    client.send({"id": 24, "messages": QUESTION, "max_new_tokens": 200})
    client.send({"id": 25, "rows": ROWS})
    client.send({"stop": 25})
    client.send({"stop": 24})
    client.answer(24)
    rows, _, done = scored(client, 25)
    assert (rows, done["stopped"]) == ([], True)


@pytest.mark.parametrize(
    ("row", "key", "said"),
    [
        ("no JSON", None, "is not a JSON object"),
        ([1], None, "is not a JSON object"),
        ("[" * 100_000, None, "is not a JSON object"),
        ("\udcff", None, "is not a JSON object"),
        ({"id": 1, "messages": [{"role": "user", "content": " "}]}, 1, "content is empty"),
        (
            {"id": 1, "messages": [*QUESTION, {"role": "system", "content": "x"}, *QUESTION]},
            1,
            "a system turn comes first",
        ),
        ({"messages": QUESTION}, None, "id=None"),
        ({"id": True, "messages": QUESTION}, None, "id=True"),
        ({"id": 1}, 1, "messages: a list"),
        ({"id": 1, "messages": [{"role": "user"}]}, 1, "messages[0]: an object of `role`"),
        ({"id": 1, "messages": [{"role": "x", "content": "x"}]}, 1, "messages[0]: role is one of"),
        ({"id": 1, "messages": [{"role": "assistant", "content": "x"}]}, 1, "of 'assistant'"),
        ({"id": 1, "messages": QUESTION, "adapter": "min"}, 1, "adapter='min': there are base, m"),
        ({"id": 1, "messages": QUESTION, "adapter": []}, 1, "adapter=[]"),
        (
            {"id": 1, "messages": [{**QUESTION[0], "nmae": "Ada"}]},
            1,
            "messages[0]: there is no key 'nmae'; near names: name",
        ),
        (
            {"id": 1, "messages": QUESTION, "tools": [{"name": "f"}]},
            1,
            "has tools, and the chat template",
        ),
        ({"id": 1, "messages": QUESTION, "tools": "f"}, 1, "The request has 'f' as tools"),
        (
            {"id": 1, "messages": QUESTION, "chat_template_kwargs": {"a": 1}},
            1,
            "has no variable 'a'",
        ),
        (
            {"id": 1, "messages": [{**QUESTION[0], "images": ["aGk="]}]},
            1,
            "The image of a request cannot be shown to this model, which reads text alone",
        ),
        (
            {"id": 1, "messages": [{**QUESTION[0], "images": "aGk="}]},
            1,
            "messages[0]: images is a list of image files in base64",
        ),
        ({"id": 1, "messages": QUESTION, "topk": 1}, 1, "no field 'topk'; near names: top_"),
        ({"id": 1, "messages": QUESTION, "stop": "x"}, 1, "stop='x': a list of texts"),
        (
            {"id": 1, "messages": QUESTION, "temperature": -1, "top_p": 0, "seed": 0.5},
            1,
            "temperature=-1: 0 or more; top_p=0: more than 0, and at most 1; seed=0.5: a whole",
        ),
        ({"id": 1, "messages": [{"role": "user", "content": "x " * 9_000}]}, 1, "Shorten it"),
        ({"id": 1, "rows": []}, 1, "rows: a list of objects"),
        ({"id": 1, "rows": ROWS, "messages": QUESTION}, 1, "messages: a request with `rows` has"),
        ({"id": 1, "rows": ROWS, "adapters": ["other"]}, 1, "adapters=['other']: a list of base"),
        ({"id": 1, "messages": QUESTION, "adapters": ["mine"]}, 1, "one with `messages` has `ada"),
        ({"id": 1, "rows": [*ROWS, {"reference": 3}]}, 1, "rows[2]: an object of `messages`"),
        ({"id": 1, "rows": [{"messages": []}]}, 1, "rows[0].messages: a list of turns"),
        (
            {"id": 1, "rows": [{"messages": [{"role": "tool", "content": "x"}]}]},
            1,
            "rows[0].messages: the last turn is of 'tool'",
        ),
    ],
)
def test_a_bad_request_is_answered_and_ends_nothing(client, row, key, said):
    client.send(row)
    answered = client.read()
    assert answered["id"] == key
    assert said in answered["error"]


def test_it_still_answers_and_ends_with_its_input(client):
    client.send({"id": "last", "messages": QUESTION, "max_new_tokens": 2})
    client.process.stdin.close()
    assert client.answer("last")[1]["done"]
    assert client.process.wait(60) == 0
    assert client.process.stdout.read() == ""


def test_what_cannot_be_loaded_is_said_in_a_line_too(tmp_path, program):
    code, out, err = program.run(tmp_path, "chat", str(tmp_path / "none"), "--serve")
    assert code == 2
    *_, last = map(json.loads, out.splitlines())
    assert "is neither a folder nor a checkpoint here" in last["error"]
    assert last["error"] in err
