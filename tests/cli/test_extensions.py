"""Commands that come as entry points, of this distribution and of others."""

import subprocess
import sys
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest

from lightning_peft import cli
from lightning_peft.cli import command_groups, main

MODULE = """
from lightning_peft.errors import UnsupportedError

ABOUT = "Count the words."


def main(arguments):
    if not arguments:
        raise UnsupportedError("there are no words")
    print(len(arguments), "words")
    return 0
"""


@pytest.fixture
def extension(tmp_path, monkeypatch):
    """An installed distribution with a command, and one named as a command of this package."""
    folder = tmp_path / "wordcount-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: wordcount\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(
        f"[{cli.EXTENSIONS}]\ncount-words = wordcount_command\nmerge = wordcount_command\n"
    )
    (tmp_path / "wordcount_command.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("extension")
def test_another_distribution_adds_a_command(capsys, refused):
    assert command_groups()["Extensions"] == ("app", "count-words")
    assert main(["--help"]) == 0
    assert "  count-words Count the words." in capsys.readouterr().out
    assert main(["count-words", "a", "b"]) == 0
    assert capsys.readouterr().out == "2 words\n"
    assert main(["count-words"]) == 1
    assert capsys.readouterr().err == "lightning-peft: there are no words\n"
    assert "near names: count-words" in refused("count-wrods")


@pytest.mark.usefixtures("extension")
def test_it_replaces_no_command_of_this_package(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["merge", "--help"])
    assert stop.value.code == 0
    assert "lightning-peft merge" in capsys.readouterr().out


def test_a_checkout_knows_its_commands_whatever_was_installed(monkeypatch):
    monkeypatch.setattr(cli, "entry_points", lambda group: ())
    assert command_groups()["Extensions"] == ("app",)


def test_without_a_checkout_the_metadata_of_the_installation_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "lightning_peft" / "cli" / "__init__.py"))
    point = EntryPoint("app", "gradio_app.command", cli.EXTENSIONS)
    monkeypatch.setattr(cli, "entry_points", lambda group: [point])
    assert command_groups()["Extensions"] == ("app",)
    assert cli.find_command("app").about.startswith("Open the web page")


def test_the_page_without_gradio_says_what_to_install(tmp_path):
    code = (
        "import sys; from lightning_peft.cli import main; sys.modules['gradio'] = None\n"
        "sys.exit(main(['app', '--no-open']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "The page needs Gradio, which is not installed" in done.stderr
    assert "pip install 'lightning-peft[app]'" in done.stderr


@pytest.mark.parametrize(("value", "reason"), [("gone", "No module"), ("math", "ABOUT")])
def test_one_that_cannot_be_loaded_is_named_and_hides_no_other(value, reason, monkeypatch, capsys):
    point = EntryPoint("odd", value, cli.EXTENSIONS)
    monkeypatch.setattr(cli, "entry_points", lambda group: [point])
    assert main(["odd"]) == 2
    refusal = capsys.readouterr().err
    assert f"the command 'odd' cannot be loaded from {value!r} (" in refusal
    assert reason in refusal
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "the command 'odd' cannot be loaded" in out
    assert "  app " in out


def test_the_page_is_that_of_this_distribution(monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "lightning_peft" / "cli" / "__init__.py"))
    other = EntryPoint("app", "math", cli.EXTENSIONS)
    load = EntryPoint("app", "gradio_app.command", cli.EXTENSIONS).load
    # Metadata of an editable install may be older than the command.
    own = SimpleNamespace(name="app", dist=SimpleNamespace(name="lightning-peft"), load=load)
    for points in ([own, other], [other, own]):
        monkeypatch.setattr(cli, "entry_points", lambda group, points=points: points)
        assert cli.find_command("app").about.startswith("Open the web page")
