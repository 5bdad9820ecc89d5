"""What visitors send is checked: ids, paths, names, and text that is shown."""

from __future__ import annotations

import pytest

from gradio_app.errors import UserError
from gradio_app.guards import (
    checked_hub_name,
    checked_revision,
    checked_run_id,
    escaped,
    inside,
    redacted,
    shortened,
)


@pytest.mark.parametrize("text", ["20261125-120000-sft-ab12", "a", "0"])
def test_ids_of_runs_pass(text):
    assert checked_run_id(text) == text


@pytest.mark.parametrize(
    "text",
    ["", "..", "../x", "a/b", "A", "-a", "a.b", "a\n", "a\0", "x" * 81, None, 3, ["a"], {"a": 1}],
)
def test_other_ids_are_refused(text):
    with pytest.raises(UserError, match=r"errors\.no_such_run"):
        checked_run_id(text)


def test_paths_inside_pass_and_others_are_refused(tmp_path):
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("secret")
    (root / "link").symlink_to(tmp_path / "secret.txt")
    assert inside(root, "folder/../folder/new.jsonl") == root / "folder/new.jsonl"
    for path in ("../secret.txt", "/etc/passwd", "link", "folder/../../secret.txt", "a\0b"):
        with pytest.raises(UserError, match=r"errors\.outside"):
            inside(root, path)


@pytest.mark.parametrize("text", ["gpt2", "HuggingFaceTB/SmolLM2-135M", " a/b.c_d "])
def test_names_on_the_hub_pass(text):
    assert checked_hub_name(text) == text.strip()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a/b/c",
        "../a",
        "/etc",
        "a..b/c",
        "http://169.254.169.254/latest",
        "a b",
        "-x/y",
        "--config=x",
        "a--b",
        "a/b;rm",
        "a\n",
        "a/$(id)",
        None,
        ["a"],
    ],
)
def test_other_names_are_refused(text):
    if text == "a\n":
        assert checked_hub_name(text) == "a"
        return
    with pytest.raises(UserError, match=r"errors\.hub_name"):
        checked_hub_name(text)


def test_a_revision_may_be_left_out_but_not_where_a_commit_is_needed():
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert checked_revision(None) is None
    assert checked_revision("refs/pr/1") == "refs/pr/1"
    assert checked_revision(commit, commit=True) == commit
    for text in ("", "main", commit[:-1], commit.upper()):
        with pytest.raises(UserError, match=r"errors\.commit"):
            checked_revision(text, commit=True)
    for text in ("-x", "a..b", "a b", "a;b"):
        with pytest.raises(UserError, match=r"errors\.revision"):
            checked_revision(text)


@pytest.mark.parametrize(
    "secret",
    [
        "hf_abcdefghijklmnop",
        "Authorization: Bearer abcdefgh.ijklmnop",
        "https://x/y?token=abcdefghijkl&z=1",
        "sk-abcdefghijklmnopqrst",
        "AKIAABCDEFGHIJKLMNOP",
        "WANDB_API_KEY=0123456789abcdef",
    ],
)
def test_secrets_are_hidden_wherever_text_is_shown(secret):
    for shown in (redacted(secret), escaped(secret), shortened(secret)):
        assert "[hidden]" in shown
        assert "ijkl" not in shown
        assert "0123456789abcdef" not in shown


def test_text_of_others_is_no_html():
    assert escaped("<img src=x onerror=\"alert('1')\">").count("<") == 0
    assert "'" not in escaped("'")
