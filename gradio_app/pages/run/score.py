"""Score on held-out rows: answers of base and tuned model against the expected ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gradio as gr

from gradio_app.chat.prompts import MAX_SCORED, scored_rows
from gradio_app.chat.request import Sampling
from gradio_app.chat.sessions import ScoreProgress
from gradio_app.errors import UserError
from gradio_app.pages.components import Update, field, html, markup
from gradio_app.pages.run.conversation import ChatInputs, parse_settings
from gradio_app.pages.run.live_html import answer_cell, shortened_cell
from gradio_app.pages.run_state import checkpoint_label
from gradio_app.pages.templating import message, render
from gradio_app.runs.types import Run
from gradio_app.studio import Studio
from gradio_app.texts import Texts
from lightning_peft.chat.answer_scores import ScoreSummary, summarize_rows

USUAL_ROWS = 20
# On a Space, whose one model others wait for: rows, and tokens of an answer.
SPACE_ROWS, SPACE_TOKENS = 20, 128
# Of an answer in the table.
MAX_CELL = 2_000


class ScoreView:
    """The components, and what they show.

    Attributes:
        outputs: What shows a score.
        polled_outputs: What changes by itself.
    """

    def __init__(self, t: Texts) -> None:
        self.t = t
        with gr.Column(elem_id="try-score", visible=False) as self.body:
            html(f"<h2>{t('playground.score')}</h2>")
            with gr.Row(elem_id="try-score-actions", equal_height=True):
                self.rows = field(
                    gr.Number,
                    t,
                    "playground.score_rows",
                    "try-score-rows",
                    value=USUAL_ROWS,
                    minimum=1,
                    maximum=MAX_SCORED,
                    precision=0,
                    scale=1,
                )
                self.start = gr.Button(
                    t("playground.score_start"), elem_id="try-score-start", variant="primary"
                )
                self.stop = gr.Button(
                    t("playground.stop"), elem_id="try-score-stop", interactive=False
                )
            self.result = markup(elem_id="try-score-result")
        self.outputs: list[Any] = [self.result, self.stop]
        self.polled_outputs: list[Any] = [self.body, self.start]

    def polled_updates(self, known: int, resting: bool) -> list[Update]:
        """Returns the updates of ``polled_outputs`` for a run with so many held-out rows."""
        return [
            (gr.Column(visible=known > 0), known > 0),
            (gr.Button(interactive=resting), resting),
        ]


def score_handler(
    studio: Studio, view: ScoreView, status: Callable[[Run], str], warn: Callable[[UserError], None]
) -> Callable[..., Iterator[tuple[Any, ...]]]:
    """Returns the handler of the button; its outputs are ``view.outputs`` and the model status."""
    t = view.t

    def act(request: gr.Request, run_id: Any, rows: Any, *values: Any) -> Iterator[tuple[Any, ...]]:
        run = studio.run(request, run_id)
        now = ScoreProgress(total=0)
        busy, free = gr.Button(interactive=True), gr.Button(interactive=False)
        try:
            checkpoint, sampling = parse_settings(run, ChatInputs(*values))
            asked = scored_rows(run, checked_rows(rows, sampling, studio.settings.space))
            for _ in studio.chat.load(run.owner, run, checkpoint.name):
                yield gr.skip(), gr.skip(), status(run)
            names = (t("playground.base"), checkpoint_label(checkpoint, t, short=True))
            names = (names[0], t("playground.tuned", which=names[1]))
            for now in studio.chat.score(run.owner, run, checkpoint.name, asked, sampling):
                yield score_html(now, names, t), busy, status(run)
        except UserError as refusal:
            warn(refusal)
        yield gr.skip(), free, status(run)

    return act


def checked_rows(rows: Any, sampling: Sampling, space: bool) -> int:
    """Returns how many rows are scored; raises UserError for too many, or too long answers."""
    most = SPACE_ROWS if space else MAX_SCORED
    if not isinstance(rows, (int, float)) or not 1 <= rows <= most:
        raise UserError("playground.refused_score_rows", most=most)
    if space and sampling.max_new_tokens > SPACE_TOKENS:
        raise UserError("playground.refused_length", least=1, most=SPACE_TOKENS)
    return int(rows)


def score_html(now: ScoreProgress, names: tuple[str, str], t: Texts) -> str:
    """Returns a score as far as it is known; ``names`` are those of base and tuned model."""
    parts = []
    if not now.done:
        text = t("playground.score_progress", done=now.answers, total=now.total)
        percent = round(100 * now.answers / max(now.total, 1))
        parts.append(render("playground.score_progress", t, text=text, percent=percent))
    elif now.stopped:
        text = t("playground.score_stopped", rows=len(now.rows), of=now.total // 2)
        parts.append(message("note", text, t))
    if now.rows:
        parts.append(_table(now, names, t))
    return "".join(parts)


def _table(now: ScoreProgress, names: tuple[str, str], t: Texts) -> str:
    by_name = summarize_rows(now.rows)
    base, tuned = by_name["base"], next(one for name, one in by_name.items() if name != "base")
    metrics = [("exact", [_part(one.exact, one.rows, t) for one in (base, tuned)])]
    if base.json_rows:
        valid = [_part(one.valid_json, one.json_rows, t) for one in (base, tuned)]
        metrics.append(("valid_json", valid))
    metrics.append(("overlap", [_percent(one.token_overlap, t) for one in (base, tuned)]))
    cut = sum(len(row.get("cut", ())) for row in now.rows)
    return render(
        "playground.score",
        t,
        head=["", *names],
        metrics=[(t(f"playground.score_{name}"), cells) for name, cells in metrics],
        note=t("playground.score_cut", n=cut) if cut else "",
        # The table of answers is long: it comes when all are there.
        columns=_columns(base, tuned, names, t) if now.done else [],
        rows=[_row(row, t) for row in now.rows] if now.done else [],
    )


def _columns(
    base: ScoreSummary, tuned: ScoreSummary, names: tuple[str, str], t: Texts
) -> list[tuple[str, str]]:
    counts = [t("run.samples_right", n=one.exact, of=one.rows) for one in (base, tuned)]
    heads = [(t("run.prompt"), ""), (t("run.expected"), "")]
    return [*heads, *zip(names, counts, strict=True)]


def _row(row: Mapping[str, Any], t: Texts) -> dict[str, Any]:
    answers, expected = row["answers"], row["reference"]
    cells = [
        answer_cell({"generated": text, "expected": expected, "cut": name in row["cut"]}, MAX_CELL)
        for name, text in answers.items()
    ]
    return {
        "turns": [(None, shortened_cell(row["prompt"]) or t("playground.image_alone"))],
        "expected": shortened_cell(expected, MAX_CELL),
        "answers": cells,
    }


def _part(count: int, of: int, t: Texts) -> str:
    return t("playground.score_part", n=count, of=of, percent=_percent(count / max(of, 1), t))


def _percent(share: float, t: Texts) -> str:
    return t("playground.score_percent", n=round(100 * share))
