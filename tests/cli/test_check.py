"""``lightning-peft check``, and the overrides that every command with ``--config`` takes."""

import json

import pytest

from lightning_peft.cli import main
from lightning_peft.demo.run import BASE

ROWS = [{"prompt": f"What is {i}?", "completion": str(i)} for i in range(4)]
TRIAL = ["--config=sft-lora", "--config=small/sft"]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command in a folder of its own: code, output, errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*words):
        code = main(list(words))
        streams = capsys.readouterr()
        return code, streams.out, streams.err

    return run


@pytest.fixture
def good(tmp_path):
    """Writes rows that can all be trained on."""
    (tmp_path / "good.jsonl").write_text("\n".join(map(json.dumps, ROWS)))


def test_good_rows_pass(run, good):
    code, out, _ = run("check", "good.jsonl")
    assert code == 0
    assert "read as   good.jsonl: JSON lines, in UTF-8" in out
    assert "All 4 rows can be trained on." in out
    assert "tokens    not checked" in out
    code, out, _ = run(
        "check", "--tokenizer", str(BASE), "good.jsonl", "--chat-template=plain", "--limit=4",
        "--validation-share=0",
    )  # fmt: skip
    assert code == 0
    assert "tokens    not checked" not in out


def test_problems_are_an_exit_code_and_json(run, tmp_path):
    rows = [*ROWS, {"prompt": "a"}, ROWS[0], {"prompt": "x", "completion": "y", "source_id": 7}]
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{broken")
    code, out, _ = run("check", "--json", "bad.jsonl")
    found = json.loads(out)
    assert (code, found["passed"], found["rows"], found["rejected"]) == (1, False, 8, 3)
    assert found["shape"]["name"] == "prompt_completion"
    assert [p["kind"] for p in found["problems"]] == ["unreadable", "missing", "duplicate"]
    assert [row["row"] for p in found["problems"] for row in p["rows"]] == [8, 5, 6]
    (unused,) = found["keys_unused"]
    assert (unused["key"], unused["rows"]) == ("source_id", {"bad.jsonl": "7"})
    assert found["read_as"][0]["encoding"] == "utf-8"


def test_how_a_table_is_read_is_in_the_json(run, tmp_path):
    text = "prompt;completion\nWo liegt Köln?;Am Rhein – “gut”\n"
    (tmp_path / "a.csv").write_bytes(text.encode("cp1252"))
    code, out, _ = run("check", "a.csv", "--json")
    (how,) = json.loads(out)["read_as"]
    assert (code, how["encoding"], how["encoding_by"], how["delimiter"]) == (
        0,
        "cp1252",
        "guessed",
        ";",
    )
    code, out, _ = run("check", "a.csv", "--encoding", "latin-1", "--delimiter=semicolon", "--json")
    (how,) = json.loads(out)["read_as"]
    assert (how["encoding"], how["encoding_by"]) == ("iso8859-1", "given")


def test_what_cannot_be_read_at_all_is_two(run, tmp_path):
    (tmp_path / "a.csv").write_bytes(b"a,b\n\x00\x01\x02\xff,\x00\x81\n")
    code, out, err = run("check", "a.csv", "--json")
    assert code == 2
    assert json.loads(out)["passed"] is False
    assert "holds bytes that are not text" in json.loads(out)["error"]
    assert "Traceback" not in err
    assert run("check")[0] == 2


OVERRIDES = {
    "--model.init_args.modl=x": "'modl' is not an argument of CausalLM; near names: model",
    "--modle.init_args.model=x": "near names: model.init_args.model",
    "--trainer.max_epohcs=1": "near names: trainer.max_epochs",
    "--trainer.max_epochs=many": "trainer.max_epochs='many': a whole number is expected",
    "--model.class_path=CausalLN": "there is no such class; near names: CausalLM",
    "--data.class_path=lightning_peft.SupervizedData": "near names: lightning_peft.SupervisedData",
    "--data.init_args.shape=mesages": "near names: messages",
    "--config=sft-qlroa": "Near names: sft-qlora",
    "--data.init_args.batch_size=two": "batch_size='two': a whole number is expected",
}


@pytest.mark.parametrize("command", ["preview", "check", "verify", "fit"])
def test_a_wrong_override_is_answered_with_the_nearest(run, good, command):
    place = ["--data.init_args.data=good.jsonl"]
    for word, answer in OVERRIDES.items():
        code, _, err = run(command, *TRIAL, *place, word)
        assert (code, answer in err) == (2, True), (word, err)
        assert "Does not validate" not in err


@pytest.mark.parametrize("command", ["preview", "check"])
def test_right_overrides_of_a_run_are_taken_by_all(run, good, command):
    mine = [
        "--data.init_args.data=good.jsonl",
        "--data.init_args.validation_share=0",
        "--data.init_args.columns={prompt: prompt, completion: completion}",
        "--model.init_args.model=any/model",
        "--trainer.strategy.init_args.r=4",
        "--seed_everything=3",
    ]
    code, out, err = run(command, *TRIAL, *mine)
    assert code == 0, err
    assert "All 4 rows can be trained on." in out
    code, _, err = run(command, "--data=good.jsonl", f"--tokenizer={BASE}", "--model.x=1")
    assert (code, "is for a config with a model" in err) == (2, True)


def test_a_misspelled_key_of_a_config_file_is_answered_with_the_nearest():
    from lightning_peft.plugin.config_errors import explain_parser_error

    said = explain_parser_error("Option 'trainerr.max_steps' is not accepted", "lightning")

    assert said.startswith("there is no 'trainerr.max_steps'; near names: trainer.max_steps")


@pytest.mark.parametrize("command", ["preview", "check", "plan", "fit"])
@pytest.mark.parametrize(
    ("content", "answer"),
    [
        (b"model: [1,2\ntrainer: x\n", "is not valid YAML: line 2, column 8"),
        (b"model: \xe4\n", "is not a text in UTF-8 (byte 7)"),
    ],
)
def test_a_config_that_cannot_be_parsed_is_named_with_its_place(
    run, tmp_path, command, content, answer
):
    (tmp_path / "broken.yaml").write_bytes(content)
    code, _, err = run(command, f"--config={tmp_path / 'broken.yaml'}")
    assert (code, answer in err) == (2, True), err
