import runpy
from pathlib import Path

from lightning_peft.cli import GROUPS, command_names

MADE = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "command_reference.py"))


def test_every_command_is_on_the_page_with_its_options(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    page = MADE["text"]()
    parts = dict(zip(command_names(), page.split("\n## ")[1:], strict=True))
    for name, part in parts.items():
        assert part.startswith(f"{name}\n")
        own = name not in GROUPS["Train"][1:]
        assert own == (f"lightning-peft {name}" in part)
        assert own == ("--help" in part or "-h" in part)
    monkeypatch.setenv("COLUMNS", "200")
    assert MADE["text"]() == page
