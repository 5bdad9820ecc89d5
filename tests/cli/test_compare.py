"""``lightning-peft compare``: the figures are those of the models apart, from one in memory."""

import json
import math
import re
import shutil

import pytest
import torch
from finished import BASE, EXAMPLES, adapter_in, json_of
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lightning_peft.chat.answer_scores import score_answer
from lightning_peft.cli import main
from lightning_peft.data.supervised import SupervisedData

PLAIN = ("--chat-template", "plain")
COLUMNS = ("--columns", "prompt=prompt", "completion=response")


@pytest.fixture
def examples(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines = EXAMPLES.read_text().splitlines()
    chosen = [line for line in lines if '"validation"' in line][:9]
    chosen += [line for line in lines if '"train"' in line][:3]
    file = tmp_path / "examples.jsonl"
    file.write_text("\n".join(chosen) + "\n")
    return file


def test_losses_are_those_of_the_models_apart(lora_run, qlora_run, examples, tmp_path, new_process):
    words = ["compare", f"a={lora_run}", f"b={qlora_run}", "--data", examples, *COLUMNS, *PLAIN]
    rows = tmp_path / "rows.jsonl"
    found = json_of(new_process(*words, "--bits", "16", "--json", "--output", rows))
    assert found["compared"] == ["base", "a", "b"]
    assert found["rows"] == 9
    data = SupervisedData(
        str(examples),
        str(BASE),
        columns={"prompt": "prompt", "completion": "response"},
        chat_template="plain",
        batch_size=1,
    )
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    tuned = PeftModel.from_pretrained(base, adapter_in(lora_run)).eval()
    totals = {"base": [], "a": []}
    tokens = hits = 0
    for batch in data.val_dataloader():
        count = int((batch["labels"][:, 1:] != -100).sum())
        tokens += count
        with torch.no_grad():
            output = tuned(**batch)
            totals["a"].append(output.loss.item() * count)
            with tuned.disable_adapter():
                totals["base"].append(tuned(**batch).loss.item() * count)
        right = output.logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]
        hits += int(right.sum())
    scores = {score["name"]: score for score in found["scores"]}
    for name, losses in totals.items():
        assert scores[name]["tokens"] == tokens
        assert scores[name]["loss"] == pytest.approx(sum(losses) / tokens, rel=1e-5)
        assert scores[name]["perplexity"] == pytest.approx(math.exp(scores[name]["loss"]))
    assert scores["a"]["token_accuracy"] == pytest.approx(hits / tokens)
    assert scores["a"]["loss"] < scores["base"]["loss"] - 0.5
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [row["row"] for row in written] == list(range(9))
    assert [row["a"]["loss"] for row in written] == pytest.approx(totals["a"], rel=1e-5)


def test_answers_side_by_side(qlora_run, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    rows = [{"prompt": "What does `len` do?", "reference": "It counts."}, {"prompt": "And `sum`?"}]
    prompts.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    words = ["compare", f"mine={qlora_run}", "--prompts", str(prompts), *PLAIN]
    assert main([*words, "--max-new-tokens", "6", "--output", str(out)]) == 0
    said = capsys.readouterr().out
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in written] == [row["prompt"] for row in rows]
    assert written[0]["reference"] == "It counts."
    assert set(written[0]["answers"]) == {"base", "mine"}
    assert written[0]["answers"]["base"] != written[0]["answers"]["mine"]
    assert "reference  It counts." in said
    assert "mine       " in said
    assert set(written[0]["scores"]) == {"base", "mine"}
    assert "scores" not in written[1]
    assert re.search(r"^1 rows +exact match +valid JSON +token overlap$", said, re.M)


def test_the_rows_that_a_run_kept_are_scored(lora_run, tmp_path, capsys, refused):
    adapter = tmp_path / "checkpoints" / "adapters" / "best"
    shutil.copytree(adapter_in(lora_run), adapter)
    words = ["compare", f"mine={adapter}", "--held-out", *PLAIN]
    assert "has no held-out rows" in refused(*words)
    row = [("system", "Be kind."), ("user", "What does `len` do?"), ("assistant", "It counts.")]
    turns = [{"role": role, "content": text} for role, text in row]
    (tmp_path / "provenance.json").write_text("{}")
    (tmp_path / "recipe.yaml").write_text("{}")
    # Of an older run, a row that was answered by a call of a tool.
    empty = [turns[1], {"role": "assistant", "content": ""}]
    (tmp_path / "prompts.json").write_text(json.dumps({"held_out": [turns, empty, turns[1:]]}))
    assert "--limit 0: at least 1" in refused(*words, "--max-new-tokens", "6", "--limit", "0")
    assert main([*words, "--max-new-tokens", "6", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    with_system, without = found["answers"]
    assert with_system["prompt"] == without["prompt"] == "What does `len` do?"
    assert with_system["answers"]["mine"] != without["answers"]["mine"]
    for name in ("base", "mine"):
        scores = [answer["scores"][name]["token_overlap"] for answer in found["answers"]]
        assert scores[0] == score_answer(with_system["answers"][name], "It counts.").token_overlap
        assert found["summary"][name]["token_overlap"] == pytest.approx(sum(scores) / 2)
        assert found["summary"][name]["rows"] == 2


def test_bad_input(lora_run, examples, tmp_path, refused):
    run = str(lora_run)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "x"}\nnothing\n{"question": "y"}\n')
    taken = tmp_path / "taken"
    taken.write_text("mine")
    data = [run, "--data", str(examples), *PLAIN]
    for words, message in [
        ([run, "--prompts", str(tmp_path / "absent")], "cannot be read as text"),
        ([run, "--prompts", str(broken)], "line 2, 3 is not a JSON object with a text"),
        ([run, "--data", "absent.jsonl"], "not a file or folder here"),
        ([*data, "--columns", "prompt"], "--columns prompt: write OURS=THEIRS"),
        ([*data, "--output", str(taken)], "taken' exists already (remove it, or name another)."),
        ([*data, "--output", str(taken / "below")], "taken' is not a folder (name another place)."),
        ([*data, *COLUMNS, "--split", "test"], "no rows for 'test'; it has train (3), valid"),
    ]:
        assert message in refused("compare", *words)
    examples.write_text(examples.read_text() + '{"prompt": "x", "split": "validation"}\n')
    assert "The data cannot be compared on" in refused("compare", *data, *COLUMNS)
    assert taken.read_text() == "mine"
