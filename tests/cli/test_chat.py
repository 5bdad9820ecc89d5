"""``lightning-peft chat`` in a process of its own, with its questions through a pipe."""

import io
import json

from finished import BASE

from lightning_peft.cli import main

SPEAK = ("--chat-template", "plain", "--max-new-tokens", "8")


def test_questions_and_commands_through_a_pipe(qlora_run, capsys, monkeypatch, new_process):
    lines = "What does `len` do?\n/base\n/reset\nWhat does `len` do?\n/quit\nnot asked\n"
    done = new_process("chat", f"mine={qlora_run}", *SPEAK, "--json", given=lines)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["adapter"] for row in rows] == ["mine", "base"]
    assert rows[0]["answer"] != rows[1]["answer"]
    assert all(0 < row["tokens"] <= 8 for row in rows)
    assert "base answers" in done.stderr
    assert main(["chat", f"mine={qlora_run}", *SPEAK, "--prompt", "What does `len` do?"]) == 0
    assert capsys.readouterr().out.strip() == rows[0]["answer"]
    monkeypatch.setattr("sys.stdin", io.StringIO("/adaptr x\nnot asked\n"))
    assert main(["chat", "--base", str(BASE), *SPEAK]) == 2
    streams = capsys.readouterr()
    assert "There is no command '/adaptr'" in streams.err
    assert streams.out == ""


def test_bad_input(lora_run, refused):
    run = str(lora_run)
    for words, message in [
        ([], "neither an ADAPTER nor --base is given"),
        ([run, "--max-new-tokens", "0"], "--max-new-tokens 0"),
        ([run, "--temperature", "-1", "--top-p", "2"], "--temperature -1.0: 0 or more; --top-p"),
        ([run, "--prompt", "x"], "has no chat template"),
        ([run, "--prompt", "x", "--chat-template", "chatlm"], "chat_template='chatlm'"),
        (["nowhere"], "is neither a folder nor a checkpoint"),
        ([run, "--base", "no/such-model"], "the hub did not give it"),
    ]:
        assert message in refused("chat", *words)
