"""Text and question/answer pairs made from the standard library's own docstrings.

The demo of lightning-peft runs with no network, so its text has to be something that every
Python installation already holds. This module gives

* plain documents for pre-training: each public docstring under a header with its qualified
  name and signature, its first sentence in several wordings, summary lists of each module, and
  a general index;
* question/answer pairs for tuning, such as ``What does `textwrap.dedent` do?`` with the first
  sentence of that docstring as the answer.

Two runs on one interpreter agree to the byte. Another Python version has other docstrings and
so gives other text; this is why the pairs that the demo uses are shipped as
``instructions.jsonl``. ``python -m tools.demo_base.corpus --write-instructions PATH``
writes them.

The text is copyright Python Software Foundation, under the PSF License Version 2; see
``README.md`` and ``LICENSE-PSF.txt`` in ``lightning_peft/demo/``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from tools.demo_base.questions import build_pairs, is_held_out, split_pairs, summary
from tools.demo_base.stdlib import Entry, read_entries

INSTRUCTIONS_PATH = Path(__file__).parents[2] / "lightning_peft" / "demo" / "instructions.jsonl"


MAX_SECTION_CHARACTERS = 600
"""Length at which a reference section ends, at the last paragraph that fits. A model with a
context of 256 tokens and four million parameters has no room for the tails of long docstrings."""


def _reference(entry: Entry) -> str:
    """Renders an entry as a reference section: a header line, then the docstring."""
    prefix = "" if entry.kind in ("function", "method", "special form") else f"{entry.kind} "
    doc = entry.doc
    if len(doc) > MAX_SECTION_CHARACTERS:
        shortened = doc[:MAX_SECTION_CHARACTERS]
        doc = shortened.rpartition("\n\n")[0] or shortened.rpartition("\n")[0]
    return f"{prefix}{entry.name}{entry.signature}\n\n{doc}"


def _notes(entry: Entry) -> Iterator[str]:
    """Yields an entry's summary in several wordings, each as a document of its own.

    A fact that was always read in one and the same surrounding is remembered with that
    surrounding only, and no tuning gets it out (Allen-Zhu and Li, 2023, "Physics of Language
    Models: Part 3.1", arXiv:2309.14316). The same fact in several wordings is remembered by its
    name.
    """
    answer = summary(entry)
    if answer is None:
        return
    name = entry.name
    yield f"`{name}`: {answer}"
    yield f"From the documentation of `{name}`:\n{answer}"
    yield f"{entry.kind} {name}{entry.signature}\n    {answer}"
    yield f">>> help({name})\n{answer}"
    if entry.path:
        yield f"In the module `{entry.module}`, {entry.kind} `{entry.path}`:\n\n{answer}"


def _module_summaries(entries: Sequence[Entry], lines_each: int = 8) -> Iterator[str]:
    """Yields lists of one-sentence summaries, module by module."""
    by_module: dict[str, list[str]] = {}
    for entry in entries:
        answer = summary(entry)
        if answer and entry.path:
            by_module.setdefault(entry.module, []).append(f"`{entry.name}`: {answer}")
    for module, lines in by_module.items():
        for start in range(0, len(lines), lines_each):
            listed = "\n".join(lines[start : start + lines_each])
            yield f"Summary of the module `{module}`\n\n{listed}"


def _general_index(entries: Sequence[Entry], lines_each: int = 12) -> Iterator[str]:
    """Yields pieces of an alphabetical index, in the form of the index of the Python manual."""
    lines = []
    for entry in entries:
        if entry.kind == "function":
            lines.append(f"{entry.path}() (function in module {entry.module})")
        elif entry.kind == "class":
            lines.append(f"{entry.path} (class in module {entry.module})")
    lines.sort(key=lambda line: (line.casefold(), line))
    for start in range(0, len(lines), lines_each):
        yield "Index\n\n" + "\n".join(lines[start : start + lines_each])


def build_documents(entries: Sequence[Entry]) -> tuple[list[str], list[str]]:
    """Makes the plain documents for pre-training: ``(train, held_out)``.

    The held-out part has the reference sections of the names that :func:`is_held_out` picks, and
    these names are in no train document's header or summary.
    """
    read = [entry for entry in entries if not is_held_out(entry.name)]
    train = [_reference(entry) for entry in read]
    train.extend(note for entry in read for note in _notes(entry))
    train.extend(_module_summaries(read))
    train.extend(_general_index(read))
    held_out = [_reference(entry) for entry in entries if is_held_out(entry.name)]
    return train, held_out


def write_instructions(path: Path, root: Path | None = None) -> tuple[int, int]:
    """Writes the pairs as JSON lines, and returns the numbers of train and validation pairs."""
    train, validation = split_pairs(build_pairs(read_entries(root)))
    lines = [
        json.dumps({"prompt": pair.prompt, "response": pair.response, "split": split})
        for split, pairs in (("train", train), ("validation", validation))
        for pair in pairs
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    return len(train), len(validation)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.demo_base.corpus",
        description="Read the standard library's docstrings and count or write what they give.",
    )
    parser.add_argument(
        "--write-instructions",
        type=Path,
        metavar="PATH",
        help="write the question/answer pairs to PATH as JSON lines",
    )
    options = parser.parse_args(arguments)
    if options.write_instructions is not None:
        train, validation = write_instructions(options.write_instructions)
        print(
            f"Wrote {train} train and {validation} validation pairs to {options.write_instructions}"
        )
        return
    entries = read_entries()
    documents, held_out = build_documents(entries)
    characters = sum(len(document) for document in documents)
    print(f"{len(entries)} documented names, {len(build_pairs(entries))} question/answer pairs")
    print(f"{len(documents)} documents ({characters:,} characters), {len(held_out)} held out")


if __name__ == "__main__":
    main()
