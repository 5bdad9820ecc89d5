"""The HTML of what a model says to the same rows while it learns. All of it is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from gradio_app.chat.prompts import HeldOutPrompt
from gradio_app.guards import escaped
from gradio_app.texts import Texts

MAX_STEPS = 4
MAX_PROMPTS = 12
_MAX_CELL = 400
Row = Mapping[str, Any]


def samples(rows: Sequence[Row], known: Sequence[HeldOutPrompt], t: Texts) -> str:
    """Returns what the model said to the same prompts at different steps.

    Args:
        rows: What the run has written.
        known: Validation rows whose turns are known.
        t: Texts.
    """
    said: dict[tuple[int, int], Row] = {}
    for row in rows:
        if isinstance(row.get("step"), int) and isinstance(row.get("sample"), int):
            said[row["step"], row["sample"]] = row
    if not said:
        return f'<p class="note">{t("run.samples_empty")}</p>'
    steps = _select_steps(sorted({step for step, _ in said}))
    places = sorted({place for _, place in said})[:MAX_PROMPTS]
    titles = [t("run.prompt"), t("run.expected")]
    counts = ["", ""]
    for step in steps:
        titles.append(t("run.after_step", step=step) if step else t("run.before_training"))
        found = [said[step, place] for place in places if (step, place) in said]
        right = sum(map(_is_correct, found))
        counts.append(t("run.samples_right", n=right, of=len(found)))
    head = "".join(
        f'<th scope="col">{title}'
        + (f'<span class="count">{count}</span></th>' if count else "</th>")
        for title, count in zip(titles, counts, strict=True)
    )
    body = "".join(_row(place, steps, said, titles, known, t) for place in places)
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{t("run.samples")}">'
        f'<table class="samples"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _row(
    place: int,
    steps: Sequence[int],
    said: Mapping[tuple[int, int], Row],
    titles: Sequence[str],
    known: Sequence[HeldOutPrompt],
    t: Texts,
) -> str:
    first = next(row for (_, sample), row in said.items() if sample == place)
    prompt, expected = str(first.get("prompt", "")), str(first.get("expected", ""))
    cells = [_shorten(expected)]
    cells += [_answer(said.get((step, place)), t) for step in steps]
    columns = "".join(
        f'<td data-label="{title}">{cell}</td>'
        for title, cell in zip(titles[1:], cells, strict=True)
    )
    return f'<tr><th scope="row">{_prompt(prompt, expected, known, t)}</th>{columns}</tr>'


def _prompt(prompt: str, expected: str, known: Sequence[HeldOutPrompt], t: Texts) -> str:
    """Returns a prompt by its turns where they are known, else the text that was given."""
    for row in known:
        if (
            row.turns is None
            or row.reference.strip() != expected.strip()
            or row.prompt not in prompt
        ):
            continue
        turns = [*row.turns, ("user", row.prompt)]
        return "".join(
            f'<div class="turn"><span class="role">{_role(role, t)}</span> {_shorten(text)}</div>'
            for role, text in turns
        )
    return _shorten(prompt)


def _role(role: str, t: Texts) -> str:
    return t(f"run.role_{role}") if t.has(f"run.role_{role}") else escaped(role)


def _is_correct(row: Row) -> bool:
    said, expected = (str(row.get(name, "")).split() for name in ("generated", "expected"))
    return bool(expected) and said == expected


def _answer(row: Row | None, t: Texts) -> str:
    """Returns an answer; the words that the expected one does not have are marked."""
    if row is None:
        return ""
    generated, expected = str(row.get("generated", "")), str(row.get("expected", ""))
    if _is_correct(row):
        return f'{_shorten(generated)} <span class="right">\u2713 {t("run.as_expected")}</span>'
    cut = f' <span class="cut">{t("run.cut")}</span>' if row.get("cut") is True else ""
    text = generated.strip()
    if len(text) > _MAX_CELL:
        return _shorten(text) + cut
    return _mark_differences(text, expected) + cut


def _mark_differences(text: str, expected: str) -> str:
    words, wanted = text.split(" "), expected.strip().split(" ")
    blocks = SequenceMatcher(None, words, wanted, autojunk=False).get_matching_blocks()
    same = {block.a + place for block in blocks for place in range(block.size)}
    # Where nothing is shared, marks would say nothing.
    if not same:
        return escaped(text)
    return " ".join(
        escaped(word) if place in same or not word.strip() else f"<mark>{escaped(word)}</mark>"
        for place, word in enumerate(words)
    )


def _shorten(text: object) -> str:
    words = str(text).strip()
    return escaped(words if len(words) <= _MAX_CELL else words[:_MAX_CELL] + "\u2026")


def _select_steps(steps: list[int]) -> list[int]:
    """Returns the first step, the last one, and those evenly between."""
    if len(steps) <= MAX_STEPS:
        return steps
    last = len(steps) - 1
    return [steps[round(last * place / (MAX_STEPS - 1))] for place in range(MAX_STEPS)]
