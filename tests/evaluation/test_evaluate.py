"""``lightning-peft evaluate``: the figures are the harness' own, from one model in memory."""

import gc
import hashlib
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from finished import BASE, adapter_in
from made_tasks import by_harness, write_task
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lightning_peft import inject, save_adapter
from lightning_peft.chat.chat_model import ChatModel
from lightning_peft.cli import evaluate as command
from lightning_peft.cli import main
from lightning_peft.errors import ConfigError, UnsupportedError
from lightning_peft.evaluation.evaluating import (
    HarnessModel,
    Settings,
    check_language_model,
    evaluate,
)
from lightning_peft.evaluation.tasks import load_tasks
from lightning_peft.export.adapters import find_adapters
from lightning_peft.export.base import Base, find_base
from lightning_peft.export.loading import load_with_adapters
from lightning_peft.export.merging import merge

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tasks")
    write_task(made, "manual_choice", "multiple_choice")
    write_task(made, "manual_answer", "generate_until", rows=2)
    return made


@pytest.fixture
def run(lora_run, tmp_path):
    """A run with the files by which it is known as one."""
    path = tmp_path / "run"
    shutil.copytree(adapter_in(lora_run), path / "checkpoints" / "adapters" / "best")
    for name in ("recipe.yaml", "provenance.json"):
        (path / name).write_text("{}")
    return path


def evaluated(words, capsys):
    assert main(["evaluate", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def check_figures(report, name, there):
    """Compares a column of the table with what the harness itself found."""
    found = {
        f"{row['metric']},{row['filter']}": (row["task"], row["values"][name])
        for row in report["results"]
    }
    assert len(found) == sum("," in key for one in there["results"].values() for key in one) / 2
    for key, (task, value) in found.items():
        assert value["value"] == pytest.approx(there["results"][task][key], rel=1e-4)


def test_figures_are_those_of_the_harness_on_a_merged_model(
    run, folder, tmp_path, monkeypatch, capsys
):
    words = [f"tuned={run}", "--tasks", "manual_choice", "--include-path", folder, "--limit", 6]
    report = evaluated(words, capsys)
    merge(str(run), tmp_path / "merged", dtype="float32")
    # The harness itself finds the rows from here only.
    monkeypatch.chdir(folder)
    check_figures(report, "tuned", by_harness(tmp_path / "merged", ["manual_choice"], limit=6))
    brier = report["results"][1]
    assert (brier["metric"], brier["higher_is_better"]) == ("brier_score", False)
    assert brier["values"]["tuned"]["value"] < brier["values"]["base"]["value"] / 2
    assert report["harness"]["package"] == "lm_eval"
    assert report["settings"]["batch_size"] == 8
    facts = report["tasks"]["manual_choice"]
    assert (facts["version"], facts["num_fewshot"]) == (2.0, 0)
    assert facts["rows"] == {"original": 12, "effective": 6}
    assert facts["hash"]["base"] == facts["hash"]["tuned"]
    rows = (folder / "manual_choice_test.jsonl").read_bytes()
    assert hashlib.sha256(rows).hexdigest() in facts["data_files"].values()
    (saved,) = report["saved"]
    assert Path(saved).parent == run / "evaluations"
    assert json.loads(Path(saved).read_text())["results"] == report["results"]


def loaded(adapters):
    base = find_base(str(BASE))
    return ChatModel(load_with_adapters(base, adapters, device=CPU), adapters)


def test_an_interrupt_leaves_the_adapters_on_and_nothing_in_memory(lora_run, folder):
    model = loaded(find_adapters([str(lora_run)]))
    network, ids = model.loaded.model, torch.arange(8)[None]
    with torch.no_grad():
        before = network(ids).logits
    seen = []

    def stop(what, done, total):
        seen.append((what, done, total))
        raise KeyboardInterrupt

    tasks = load_tasks(["manual_choice"], [str(folder)])
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tasks, Settings(limit=2), stop)
    assert seen == [("base: loglikelihood", 1, 6)]
    with torch.no_grad():
        assert torch.equal(network(ids).logits, before)
    report = evaluate(model, tasks, Settings(limit=2))
    assert report["tasks"]["manual_choice"]["rows"]["effective"] == 2
    left = weakref.ref(network)
    del model, network
    gc.collect()
    assert left() is None


def test_an_adapted_embedding_is_not_tied_once_more():
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    inject(model, r=2, target_modules=["embed_tokens"])
    tie = model.tie_weights
    HarnessModel(model, AutoTokenizer.from_pretrained(BASE), 1)
    assert model.tie_weights == tie


def test_questions_are_turns_of_the_recorded_template(tmp_path, folder):
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    inject(model, r=2)
    save_adapter(model, tmp_path / "adapter")
    facts = json.loads((tmp_path / "adapter" / "provenance.json").read_text())
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    facts["chat_template"] = template
    (tmp_path / "adapter" / "provenance.json").write_text(json.dumps(facts))
    tuned = loaded(find_adapters([f"tuned={tmp_path / 'adapter'}"]))
    tasks = load_tasks(["manual_choice"], [str(folder)])
    plain = evaluate(tuned, tasks, Settings(limit=1))
    assert plain["notes"][-1].startswith("tuned was trained with a chat template, and the quest")
    report = evaluate(tuned, tasks, Settings(limit=1, apply_chat_template=True, system="Be brief."))
    prompt = tasks.loaded["tasks"]["manual_choice"].instances[0].args[0]
    assert prompt.startswith("<system>Be brief.<user>### Question:\n")
    assert prompt.endswith("### Answer:<answer>")
    assert report["settings"]["chat_template"] == template
    assert not report["notes"] or "chat template" not in report["notes"][-1]
    # One more adapter, with a template of its own; the base is asked as the first.
    shutil.copytree(tmp_path / "adapter", tmp_path / "other")
    facts["chat_template"] = template.replace("<answer>", "<reply>")
    (tmp_path / "other" / "provenance.json").write_text(json.dumps(facts))
    both = loaded(find_adapters([f"tuned={tmp_path / 'adapter'}", str(tmp_path / "other")]))
    report = evaluate(both, tasks, Settings(limit=1, apply_chat_template=True))
    assert [note for note in report["notes"] if "prompts" in note] == [
        "other was asked with other prompts than the base, which was asked as tuned, in "
        "manual_choice: the difference is that of the prompts too. One --chat-template for all, or "
        "one adapter at a time, compares the same prompts"
    ]


def test_code_of_a_task_that_fails_at_a_later_row(tmp_path):
    write_task(tmp_path, "late", "multiple_choice", rows=2)
    (tmp_path / "code.py").write_text(
        "def question(row):\n    return row['prompt'] if row['gold'] == 2 else None.strip()\n"
    )
    file = tmp_path / "late.yaml"
    lines = file.read_text().splitlines()
    kept = [line for line in lines if not line.startswith("doc_to_text")]
    file.write_text("\n".join([*kept, "doc_to_text: !function code.question"]) + "\n")
    tasks = load_tasks(["late"], [str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "late_test.jsonl").read_text().splitlines()]
    assert [row["gold"] for row in rows] == [2, 0]
    with pytest.raises(ConfigError, match=r"evaluate late on .* attribute 'strip' \(AttributeErr"):
        evaluate(loaded([]), tasks, Settings())


def test_results_that_cannot_be_written_are_printed(run, tmp_path, capsys):
    write_task(tmp_path / "tasks", "dated", "multiple_choice", rows=1)
    file = tmp_path / "tasks" / "dated.yaml"
    file.write_text(file.read_text().replace("version: 2.0", "version: 2024-05-01"))
    (run / "evaluations").write_text("not a folder")
    made = tmp_path / "made" / "results.json"
    words = [f"base={run}", "--tasks", "dated", "--include-path", str(tmp_path / "tasks")]
    assert main(["evaluate", *words, "--output", str(made)]) == 1
    said = capsys.readouterr()
    assert f"saved  {made}" in said.out
    assert "note: the results cannot be written to" in said.err
    assert "\ndated  acc" in said.out
    report = json.loads(made.read_text())
    assert report["compared"] == ["base", "base-2"]
    assert report["tasks"]["dated"]["version"] == "2024-05-01"


def test_the_table(capsys):
    value, change = {"value": 0.25, "stderr": 0.0625}, {"value": -0.5, "stderr": None}
    row = {"task": "t", "metric": "acc", "filter": "none", "higher_is_better": True}
    row |= {"values": {"base": value, "a": value}, "differences": {"a": change}}
    other = row | {"metric": "ppl", "filter": "f", "higher_is_better": False}
    command._show({"compared": ["base", "a"], "results": [row, other], "saved": ["x.json"]})
    assert capsys.readouterr().out.splitlines() == [
        "task  metric                    base             a                difference",
        "t     acc                       0.2500 ± 0.0625  0.2500 ± 0.0625  -0.5000",
        "t     ppl (f), lower is better  0.2500 ± 0.0625  0.2500 ± 0.0625  -0.5000",
        "saved  x.json",
    ]


def test_bad_input(folder, tmp_path, monkeypatch, capsys, refused):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "hub.yaml").write_text(
        "task: on_the_hub\ndataset_path: some/data\noutput_type: multiple_choice\n"
        "test_split: test\n"
    )
    (bad / "rows.yaml").write_text(
        "task: no_rows\ndataset_path: json\ndataset_kwargs: {data_files: absent.jsonl}\n"
        "output_type: multiple_choice\ntest_split: train\n"
    )
    here = ["--base", str(BASE), "--include-path", str(bad)]
    for words, message in [
        ([], "neither an ADAPTER nor --base is given"),
        (["--base", "x", "--batch-size", "0", "--limit", "1.5"], "--batch-size 0: auto, or at lea"),
        (["--base", "x", "--limit", "1.5"], "--limit 1.5: rows from 1, or a share"),
        (["--base", "x", "--num-fewshot", "-1"], "--num-fewshot -1: 0 or more"),
        (["--base", "x", "--seed", "-1"], "--seed -1: from 0 to 4294967295"),
        (["--base", "x", "--seed", str(2**32)], "--seed 4294967296: from 0 to 4294967295"),
        (["--base", "x", "--output", f"{bad}/hub.yaml/x/o.json"], "not a folder (name another pl"),
        (["--base", "x", "--chat-template", "raw"], "no effect without --apply-chat-template"),
        (["--base", str(BASE), "--include-path", "absent"], "'absent' is not a folder here"),
        (["--base", str(BASE), "--include-path", str(BASE)], "base' has none"),
        (here, "'on_the_hub' takes the data set 'some/data' from the hub"),
        (here, "unset HF_HUB_OFFLINE"),
        (here, "'no_rows': Unable to find"),
    ]:
        assert message in refused("evaluate", *words, "--tasks", "on_the_hub,no_rows")
    found = load_tasks(["small_iso_dates"])
    assert list(found.data_files) == ["small_iso_dates"]
    short = loaded([])
    # The task requests so many new tokens.
    short.loaded.model.config.max_position_embeddings = 16
    with pytest.raises(ConfigError, match="The harness cannot evaluate small_iso_dates on this mo"):
        evaluate(short, found, Settings(limit=1))
    monkeypatch.setattr("lightning_peft.evaluation.harness_package.find_spec", lambda name: None)
    assert main(["evaluate", "--base", "x", "--tasks", "y"]) == 2
    assert "pip install 'lightning-peft[eval]'" in capsys.readouterr().err


def test_other_kinds_of_models_are_refused(lora_run):
    (adapter,) = find_adapters([f"mine={lora_run}"])
    base = find_base(str(BASE))
    check_language_model(base, [adapter])
    adapter.facts["base"]["class"] = "LlamaForSequenceClassification"
    with pytest.raises(UnsupportedError, match="mine is a LlamaForSequenceClassification, and"):
        check_language_model(base, [adapter])
    config = AutoConfig.from_pretrained(BASE, architectures=["BertForMaskedLM"])
    with pytest.raises(UnsupportedError, match="other is a BertForMaskedLM"):
        check_language_model(Base("other", BASE, config), [])
