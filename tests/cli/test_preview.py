"""``lightning-peft preview`` on real files, with the demo's tokenizer."""

import json

import pytest
from transformers import AutoTokenizer

from lightning_peft.cli.data_config import as_option
from lightning_peft.demo.run import BASE, INSTRUCTIONS

GOOD = [{"q": f"What is {i}?", "a": f"It is {'very ' * i}{i}.", "id": i} for i in range(20)]
COLUMNS = ["--columns", '{"prompt": "q", "completion": "a"}']


def write(folder, rows, arguments):
    """Writes the rows and returns the whole command line."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    given = {"--data": "rows.jsonl", "--tokenizer": str(BASE), "--cache-dir": "cache"}
    words = [word for pair in given.items() if pair[0] not in arguments for word in pair]
    return ["preview", *words, *arguments]


@pytest.fixture
def here(tmp_path, in_process, monkeypatch):
    def run(rows, *arguments, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return in_process(*write(tmp_path, rows, arguments))

    return run


@pytest.fixture
def preview(tmp_path, new_process):
    return lambda rows, *arguments: new_process(*write(tmp_path, rows, arguments))


def test_trained_tokens_are_marked_and_everything_is_counted(here):
    done = here(GOOD, *COLUMNS, "--chat-template", "plain", "--validation-share", "0")
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert "prompt and completion (prompt from 'q', completion from 'a')" in out
    assert "not used  id (rows 1-20)" in out
    assert "read as   rows.jsonl: JSON lines, in UTF-8\n" in out
    assert "rows.jsonl row 3 (+ trained, | not trained)" in out
    assert "  | What is 2?\n" in out
    assert "  + It is very very 2.</s>\n" in out
    assert "  + What" not in out
    assert "row 4 (" not in out
    assert "the end token in 20 of 20 rows" in out
    assert "256 allowed" in out
    assert "truncated: 0 rows" in out
    assert "% full; padded batches" in out
    assert "All 20 rows can be trained on." in out
    assert "\x1b" not in out


def test_a_terminal_gets_colours(here):
    done = here(
        GOOD, *COLUMNS, "--chat-template=plain", "--rows=1", FORCE_COLOR="1", TERM="xterm-256color"
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b[1;32mIt is 0.</s>\x1b[0m" in done.stdout
    assert "\x1b[2mWhat is 0?\x1b[0m" in done.stdout


def test_bad_rows_are_an_exit_code_and_can_be_skipped(here, tmp_path):
    rows = [*GOOD, "{broken", {"q": "?"}, GOOD[0], *[{"q": "a", "a": ""}] * 14]
    arguments = [*COLUMNS, "--chat-template", "plain", "--validation-share", "0"]
    done = here(rows, *arguments)
    assert done.returncode == 1
    assert "rows that cannot be read: 1" in done.stdout
    assert "rows.jsonl row 21 is not JSON" in done.stdout
    assert "rows.jsonl row 22 has no completion (column 'a')" in done.stdout
    assert "rows.jsonl row 23 is the same as row 1" in done.stdout
    assert "all rows: 22, 24-37" in done.stdout
    assert "17 of 37 rows have problems." in done.stdout
    done = here(rows, *arguments, "--skip-bad-rows", "rejected.jsonl")
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "rejected.jsonl").read_text().splitlines()) == 17


def test_json_holds_tokens_numbers_and_problems(preview):
    rows = [*GOOD, {"q": "?"}]
    done = preview(rows, *COLUMNS, "--chat-template", "plain", "--json", "--validation-share=0.2")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["shape"]["name"] == "prompt_completion"
    assert found["split_by"] == {"by": "content", "seed": 0, "shares": {"validation": 0.2}}
    assert 0.1 < found["trained_share"] < 0.9
    assert 0 < found["packing"]["efficiency"] <= 1
    train = found["splits"]["train"]
    assert sum(bucket["rows"] for bucket in found["lengths"]["buckets"]) == train["rows"]
    assert found["splits"]["validation"]["rows"] + train["rows"] == 20
    (problem,) = found["problems"]
    assert (problem["kind"], problem["rows"][0]["row"]) == ("missing", 21)
    runs = found["first_rows"][0]["runs"]
    assert [run["trained"] for run in runs] == [False, True]
    assert runs[1]["tokens"][-1] == "</s>"


def test_a_tokenizers_own_template_is_used_and_one_without_masks_is_named(here, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    body = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    tokenizer.chat_template = body + "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer.save_pretrained(tmp_path / "chat")
    done = here(GOOD, *COLUMNS, "--tokenizer", "chat")
    assert done.returncode == 0, done.stderr
    assert "template  of chat" in done.stdout
    assert "It is very 1.</s>" in done.stdout
    tokenizer.chat_template = body.replace("{{ m.content }}", "{% generation %}{% endgeneration %}")
    tokenizer.save_pretrained(tmp_path / "mute")
    done = here(GOOD, *COLUMNS, "--tokenizer", "mute")
    assert done.returncode == 1
    assert "has 0 % trained tokens with the chat template of mute" in done.stdout
    assert "rows in which nothing of the answer is trained: 20" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "row.jsonl"], "Nearest names there: rows.jsonl"),
        (["--tokenizer", "nobody/nothing"], "tokenizer='nobody/nothing' is not a folder"),
        ([], "has no chat template"),
        (["--chat-template", "plain", "--columns", '{"prompt": "x"}'], "no row has a column 'x'"),
        (["--chat-template", "plain", "--shape", "alpcaa"], "alpcaa"),
        (["--chat-templte", "plain"], "--chat_templte"),
    ],
)
def test_bad_input_is_reported_in_words(here, refused, tmp_path, arguments, message):
    columns = [] if "--columns" in arguments else COLUMNS
    assert message in refused(*write(tmp_path, GOOD, [*columns, *arguments]))


def test_arguments_can_come_from_a_file(here, tmp_path):
    (tmp_path / "data.yaml").write_text(
        f"data: {INSTRUCTIONS}\ntokenizer: {BASE}\nchat_template: plain\ncache_dir: cache\n"
    )
    done = here(GOOD, "--config", "data.yaml", "--data", str(INSTRUCTIONS))
    assert done.returncode == 0, done.stderr
    assert "train 2,638, validation 200 (column split)" in done.stdout


def test_a_recipe_is_previewed_as_it_would_be_trained(here, refused, tmp_path):
    done = here(GOOD, "--config=sft-lora", "--config=small/sft", f"--data={INSTRUCTIONS}", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["template"]["name"] == "plain"
    assert found["splits"]["train"]["rows"] == 2638
    words = ["--config=sft-lora", "--data.init_args.data=nowhere.jsonl"]
    assert "nowhere.jsonl" in refused(*write(tmp_path, GOOD, words))


def test_data_of_others_cannot_be_previewed(here, refused, tmp_path):
    (tmp_path / "own.yaml").write_text("data:\n  class_path: torch.nn.Linear\n")
    words = write(tmp_path, GOOD, ["--config=own.yaml"])
    assert "is not a data module of this package" in refused(*words)


def test_all_arguments_are_listed(here):
    done = here(GOOD, "--help-all")
    assert done.returncode == 0
    assert "--skip_bad_rows" in done.stdout
    assert "--packing" not in done.stdout


def test_options_are_spelled_either_way():
    assert as_option("--skip-bad-rows=a-b") == "--skip_bad_rows=a-b"
    assert as_option("--data.init_args.max-length=9") == "--max_length=9"
    assert as_option("--data.data=x") == "--data=x"
    assert as_option("--json") == "--json"
    assert as_option("a--b-c") == "a--b-c"
