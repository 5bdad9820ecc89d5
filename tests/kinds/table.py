"""The table of which modules work, for the documentation.

After a change to the kinds, run ``PYTHONPATH=tests python -m kinds.table`` in the project's root.
"""

from __future__ import annotations

from pathlib import Path

from . import classic, language, sequence, vision
from .kind import Kind

KINDS = [*language.KINDS, *vision.KINDS, *sequence.KINDS, *classic.KINDS]
METHODS = ("lora", "qlora")
PAGE = Path("docs/which-modules.md")
BEGIN, END = "<!-- kinds: begin -->\n", "<!-- kinds: end -->"


def table(kinds: list[Kind]) -> str:
    """Returns one Markdown table per field."""
    lines = []
    for field in dict.fromkeys(kind.field for kind in kinds):
        lines += [f"### {field}", "", "| module | LoRA | QLoRA | |", "| --- | --- | --- | --- |"]
        for kind in kinds:
            if kind.field == field:
                answers = ["refused" if method in kind.refused else "yes" for method in METHODS]
                given = ", ".join(f"`{name}={value!r}`" for name, value in kind.strategy.items())
                note = "; ".join(filter(None, (f"with {given}" if given else "", kind.note)))
                lines.append(f"| {kind.title} | {answers[0]} | {answers[1]} | {note} |")
        lines.append("")
    return "\n".join(lines) + "\n"


def page() -> str:
    """Returns the page with the table as it should be."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table(KINDS)}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
