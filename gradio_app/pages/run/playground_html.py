"""The HTML of the playground."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gradio_app.chat.prompts import SystemPrompt
from gradio_app.chat.sessions import AnswerChunk, ModelStatus
from gradio_app.guards import escaped
from gradio_app.pages.markup import render_code_spans
from gradio_app.runs.formatting import format_bytes, format_count, format_duration
from gradio_app.texts import Texts

_LOADING_KEYS = {
    "loading the libraries": "libraries",
    "finding the base": "base",
    "loading the model": "model",
}


def empty(t: Texts) -> str:
    """Returns the notice before the first checkpoint."""
    more = f"<p>{t('playground.empty_more')}</p>"
    return f'<div class="nothing"><h2>{t("playground.empty")}</h2>{more}</div>'


def unsupported(kind: str, t: Texts) -> str:
    """Returns the notice for a run whose task cannot chat."""
    what = t(f"playground.silent_{kind}")
    more = render_code_spans(t("playground.silent_more"))
    return f'<div class="nothing"><h2>{t("playground.silent")}</h2><p>{what}</p><p>{more}</p></div>'


def model_status(now: ModelStatus, reason: str, minutes: int, t: Texts) -> str:
    """Returns how the model is.

    Args:
        now: How it is.
        reason: Why it cannot be used now; empty if it can.
        minutes: After how many without a question it is unloaded.
        t: Texts.
    """
    note = ""
    if reason:
        sign, text = "\u26a0", reason
    elif now.phase == "loading":
        what = t(f"playground.what_{_LOADING_KEYS.get(now.what, 'starting')}")
        sign, text = (
            "\u25cc",
            t("playground.loading", what=what, time=format_duration(now.seconds, t)),
        )
    elif now.phase == "none":
        sign, text = "\u25cb", t("playground.none")
    else:
        device = t("playground.device_cpu" if now.device == "cpu" else "playground.device_cuda")
        memory = format_bytes(now.memory_bytes, t)
        sign, text = "\u25cf", t(f"playground.{now.phase}", device=device, memory=memory)
        note = t("playground.idle_note", minutes=minutes)
    more = "".join(f'<p class="note">{escaped(line)}</p>' for line in (note, *now.notes) if line)
    name = "blocked" if reason else now.phase
    return (
        f'<div class="model {name}" role="status"><p><span aria-hidden="true">{sign}</span> '
        f"{escaped(text)}</p>{more}</div>"
    )


def reference(text: str, t: Texts) -> str:
    """Returns the answer that the data has; empty where it has none."""
    if not text:
        return ""
    return (
        f'<figure class="reference"><figcaption>{t("playground.reference")}</figcaption>'
        f"<blockquote>{escaped(text)}</blockquote></figure>"
    )


def system_note(found: SystemPrompt, t: Texts) -> str:
    """Returns where the system prompt of a chat comes from."""
    if not found.of:
        text = t("playground.system_info")
    elif not found.text:
        text = t("playground.system_none")
    else:
        kind = "all" if found.rows == found.of else "most"
        text = t(f"playground.system_{kind}", rows=found.rows, of=found.of)
    return f'<p class="note">{escaped(text)}</p>'


def answer_notes(ends: Mapping[str, AnswerChunk], t: Texts) -> str:
    """Returns how answers ended, by who gave them."""
    lines = []
    for who, piece in ends.items():
        kind = "stopped" if piece.stopped else "whole" if piece.ended else "cut"
        lines.append(t(f"playground.note_{kind}", who=who, tokens=piece.tokens))
        if piece.speed:
            lines[-1] += " " + t("playground.speed", n=format_count(piece.speed, t))
    dropped = max((piece.dropped for piece in ends.values()), default=0)
    if dropped:
        lines.append(t("playground.note_dropped", n=dropped))
    inner = "".join(f"<span>{escaped(line)}</span>" for line in lines)
    return f'<p class="note ends" role="status">{inner}</p>'


def vote_result(outcome: str, who: Mapping[str, str], t: Texts) -> str:
    """Returns whom a vote was for, and who was who."""
    sides = [
        t("playground.side_is", side=t(f"playground.side_{side}"), who=t(f"playground.who_{name}"))
        for side, name in who.items()
    ]
    said = f"{t(f'playground.voted_{outcome}')} {', '.join(sides)}."
    return f'<p class="revealed" role="status">{escaped(said)}</p>'


def checkpoint_label(checkpoint: str, step: int | None, t: Texts) -> str:
    """Returns which checkpoint is meant: by its step where that is known, else by its name."""
    return checkpoint if step is None else t("playground.at_step", step=step)


def vote_summary(counts: Mapping[str, int], which: str, t: Texts) -> str:
    """Returns the votes so far."""
    title = f"<h2>{escaped(t('playground.votes', which=which))}</h2>"
    total = sum(counts.values())
    if not total:
        return f'{title}<p class="note">{t("playground.votes_none")}</p>'
    rows = "".join(
        f'<div class="{name}"><dt>{t(f"playground.tally_{name}")}</dt>'
        f'<dd><strong>{count}</strong><span class="part" aria-hidden="true">'
        f'<span style="width:{100 * count / total:.0f}%"></span></span></dd></div>'
        for name, count in counts.items()
    )
    return f'{title}<dl class="tally">{rows}</dl>'


def button_label(lines: Sequence[str]) -> str:
    """Returns text on one line, short enough for a button."""
    text = " ".join(" ".join(lines).split())
    return text if len(text) <= 90 else text[:89] + "\u2026"
