"""The table of which modules work, for the documentation.

After a change to the kinds, run ``PYTHONPATH=tests python -m kinds.table`` in the project's root.
"""

from __future__ import annotations

from pathlib import Path

from lightning_peft.engine.backends.loaded import LoadedFormat
from lightning_peft.engine.backends.registry import backends
from lightning_peft.engine.selection.unsupported_layers import FORMATS

from . import classic, language, sequence, vision
from .kind import Kind
from .shapes import SHAPES, Shape

KINDS = [*language.KINDS, *vision.KINDS, *sequence.KINDS, *classic.KINDS]
METHODS = ("lora", "qlora")
PAGE = Path("docs/which-modules.md")
MARK = "<!-- {}: {} -->"


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


def shape_table(shapes: list[Shape]) -> str:
    """Returns one Markdown table of what is adapted, left and trained."""
    head = ("module", "adapted", "left as it is", "trains in full", "stays in eval mode", "")
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for shape in shapes:
        if shape.title:
            left = ", ".join(f"`{name}` ({why})" for name, why in shape.left.items())
            cells = [shape.title, _names(shape.adapted), left, _names(shape.trains)]
            given = ", ".join(f"`{name}={value!r}`" for name, value in shape.given.items())
            note = "; ".join(filter(None, (f"with {given}" if given else "", shape.note)))
            cells += [_names(shape.eval), note.replace("|", "\\|")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def format_table() -> str:
    """Returns one Markdown table of the formats that weights may be stored in."""
    head = (
        "format",
        "adapters train",
        "merged",
        "cached",
        "exported",
        "kept packed, loading takes",
    )
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    exported = "from the 16-bit base"
    for title, cached in (("4-bit (NF4, FP4)", "where quantized here"), ("8-bit", "no")):
        cells = (
            f"bitsandbytes {title}",
            "yes",
            "to dense weights",
            cached,
            exported,
            "bitsandbytes",
        )
        lines.append("| " + " | ".join(cells) + " |")
    read = {backend.name for backend in backends() if isinstance(backend, LoadedFormat)}
    for stored in FORMATS.values():
        answers = ["refused"] * 4
        if stored.name in read:
            answers = ["yes", "to dense weights", "no", exported]
        elif stored.name == "gguf":
            answers = ["on dense weights, or NF4 of them", "yes", "NF4 of it", "yes"]
        elif stored.dense is not None:
            tried = "" if stored.tried else " (not tried here)"
            loaded = f"where `{stored.dense}` loads it dense, also as NF4{tried}"
            answers = [loaded, "in Python", "no", exported]
        lines.append("| " + " | ".join((stored.title, *answers, stored.takes)) + " |")
    return "\n".join(lines) + "\n"


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def page() -> str:
    """Returns the page with the tables as they should be."""
    text = PAGE.read_text(encoding="utf-8")
    tables = {
        "kinds": table(KINDS),
        "shapes": shape_table(SHAPES),
        "formats": format_table(),
    }
    for mark, made in tables.items():
        begin, end = MARK.format(mark, "begin") + "\n", MARK.format(mark, "end")
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}{made}{end}{after}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
