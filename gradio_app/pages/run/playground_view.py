"""Components of the playground, and rendering of conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from gradio_app.chat.prompts import MAX_PROMPTS, SystemPrompt
from gradio_app.chat.request import (
    MAX_NEW_TOKENS,
    MAX_REPETITION_PENALTY,
    MAX_TEMPERATURE,
    MAX_TEXT,
    MAX_TOP_K,
    PRESETS,
    Sampling,
    Turns,
)
from gradio_app.chat.sessions import AnswerChunk, ModelStatus
from gradio_app.chat.votes import VOTES
from gradio_app.pages.components import field, html
from gradio_app.pages.run.conversation import MODES, Conversation
from gradio_app.pages.run.score import ScoreView
from gradio_app.pages.run_state import checkpoint_label
from gradio_app.pages.templating import message, render
from gradio_app.runs.formatting import format_bytes, format_count, format_duration
from gradio_app.texts import Texts

# Answers that are code or JSON.
_MONO = "() => document.querySelector('#try-columns').classList.toggle('mono')"
_LOADING_KEYS = {
    "loading the libraries": "libraries",
    "finding the base": "base",
    "loading the model": "model",
}
_SIGNS = {"none": "\u25cb", "loading": "\u25cc"}


class PlaygroundView:
    """The components.

    Attributes:
        settings: What a question is asked with, as ``ChatInputs``.
        image_outputs: What shows the images of the next question.
        conversation_outputs: What shows a conversation.
        polled_outputs: What changes by itself.
    """

    def __init__(self, t: Texts) -> None:
        self.t = t
        self.empty = html(render("playground.empty", t), elem_id="try-empty")
        with gr.Column(elem_id="try-body", visible=False) as self.body:
            self._build_model()
            self._build_system()
            self._build_columns()
            self._build_question()
            sampling = self._build_sampling()
            self.score = ScoreView(t)
            self.vote_summary = html(elem_id="try-tally")
        self.settings: list[Any] = [self.mode, self.checkpoint, self.system, *sampling, self.other]
        self.image_outputs: list[Any] = [self.images, self.shown_images]
        self.conversation_outputs: list[Any] = [
            *(self.left, self.right, self.notes, self.reference),
            *(self.ballot, self.revealed, self.stop, self.again, self.edit, self.save),
        ]
        self.polled_outputs: list[Any] = [
            *(self.empty, self.body, self.model_status, self.load, self.unload),
            *(self.checkpoint, self.other),
            *(self.held_out, *self.prompts, self.ask, self.image_row),
            *(self.vote_summary, self.system, self.system_note),
            *self.score.polled_outputs,
        ]

    def _button(self, key: str, name: str, size: Any = "md", **options: Any) -> gr.Button:
        return gr.Button(
            self.t(f"playground.{key}"), elem_id=f"try-{name}", size=size, scale=0, **options
        )

    def _build_model(self) -> None:
        t = self.t
        html(f"<h2>{t('playground.state')}</h2>")
        with gr.Row(elem_id="try-model", equal_height=True):
            self.model_status = html(elem_id="try-state")
            self.load = self._button("load", "load")
            self.unload = self._button("unload", "unload", visible=False)
        modes = ("playground.mode_", MODES)
        with gr.Row(elem_id="try-choices"):
            self.mode = field(
                gr.Radio, t, "playground.mode", "try-mode", modes, value="both", scale=2
            )
            self.checkpoint = field(
                gr.Dropdown,
                t,
                "playground.checkpoint",
                "try-checkpoint",
                choices=[],
                filterable=False,
                scale=1,
            )
            self.other = field(
                gr.Dropdown,
                t,
                "playground.other",
                "try-other",
                choices=[(t("playground.base"), "")],
                value="",
                filterable=False,
                scale=1,
            )

    def _build_system(self) -> None:
        with gr.Row(elem_id="try-system", equal_height=True):
            self.system = field(
                gr.Textbox,
                self.t,
                "playground.system",
                "try-system-prompt",
                max_lines=6,
                max_length=MAX_TEXT,
                scale=4,
            )
            self.clear_system = self._button("system_clear", "system-clear")
        self.system_note = html(elem_id="try-system-note")

    def _build_columns(self) -> None:
        t = self.t
        with gr.Column(elem_id="try-held-out", visible=False) as self.held_out:
            html(f"<h2>{t('playground.held_out')}</h2>")
            with gr.Row(elem_id="try-prompts"):
                self.prompts = [
                    gr.Button("", visible=False, size="md", elem_id=f"try-prompt-{place}")
                    for place in range(MAX_PROMPTS)
                ]
        mono = field(gr.Checkbox, t, "playground.mono", "try-mono", container=False)
        mono.input(None, None, None, js=_MONO)
        with gr.Row(elem_id="try-columns"):
            self.left = self._column("try-left", t("playground.base"))
            self.right = self._column("try-right", t("playground.mode_tuned"))
        self.notes = html(elem_id="try-notes")
        self.reference = html(elem_id="try-reference")
        with gr.Column(elem_id="try-ballot", visible=False) as self.ballot:
            html(f"<h2>{t('playground.which_better')}</h2>")
            with gr.Row(elem_id="try-votes"):
                self.votes = {
                    vote: gr.Button(
                        t(f"playground.vote_{vote}"),
                        elem_id=f"try-vote-{vote.replace('_', '-')}",
                        size="md",
                    )
                    for vote in VOTES
                }
        self.revealed = html(elem_id="try-revealed")

    def _column(self, name: str, label: str) -> gr.Chatbot:
        # As text: what a model says could be Markdown that fetches images from anywhere.
        return gr.Chatbot(
            [],
            label=label,
            elem_id=name,
            buttons=["copy"],
            render_markdown=False,
            placeholder=self.t("playground.nothing_said"),
            height=440,
            layout="bubble",
            min_width=280,
        )

    def _build_question(self) -> None:
        with gr.Row(elem_id="try-images", visible=False) as self.image_row:
            self.images = gr.UploadButton(
                self.t("playground.images"),
                file_types=["image"],
                file_count="multiple",
                size="md",
                scale=0,
            )
            self.clear_images = self._button("images_clear", "images-clear")
            self.shown_images = html(elem_id="try-shown-images")
        with gr.Column(elem_id="try-asking"):
            self.question = field(
                gr.Textbox,
                self.t,
                "playground.question",
                "try-question",
                max_lines=8,
                max_length=MAX_TEXT,
            )
            with gr.Row(elem_id="try-actions"):
                self.ask = self._button("ask", "ask", "lg", variant="primary")
                self.stop = self._button("stop", "stop", "lg", interactive=False)
                self.again = self._button("again", "again", "lg", interactive=False)
                self.edit = self._button("edit", "edit", "lg", interactive=False)
                self.reset = self._button("reset", "reset", "lg")
                self.save = self._button("save", "save", "lg", interactive=False)
                self.open = gr.UploadButton(
                    self.t("playground.open"), file_types=[".jsonl"], size="lg", scale=0
                )
                self.saved = gr.Textbox(visible="hidden", elem_id="try-saved")

    def _build_sampling(self) -> list[Any]:
        usual = Sampling()
        fine = {"step": 0.05}
        with gr.Accordion(self.t("playground.settings"), open=False, elem_id="try-settings"):
            with gr.Row(elem_id="try-presets"):
                self.presets = {name: self._button(f"preset_{name}", name) for name in PRESETS}
            with gr.Row():
                temperature = self._number(
                    "temperature", usual.temperature, 0, maximum=MAX_TEMPERATURE, **fine
                )
                top_p = self._number("top_p", usual.top_p, 0.05, maximum=1, **fine)
                top_k = self._number("top_k", usual.top_k, 0, maximum=MAX_TOP_K, precision=0)
            with gr.Row():
                repetition = self._number(
                    "repetition",
                    usual.repetition_penalty,
                    0.1,
                    maximum=MAX_REPETITION_PENALTY,
                    **fine,
                )
                length = self._number(
                    "length", usual.max_new_tokens, 1, maximum=MAX_NEW_TOKENS, precision=0
                )
                self.seed = self._number("seed", usual.seed, 0, precision=0)
            stop = field(gr.Textbox, self.t, "playground.stop_texts", "try-stop-texts", lines=2)
        self.preset_outputs = [temperature, top_p, top_k, repetition]
        return [temperature, top_p, length, self.seed, top_k, repetition, stop]

    def _number(self, name: str, value: float, least: float, **options: Any) -> Any:
        return field(gr.Number, self.t, f"playground.{name}", value=value, minimum=least, **options)

    def image_updates(self, paths: Sequence[str]) -> tuple[gr.UploadButton, str]:
        """Returns the values of ``image_outputs``: the images of the next question."""
        shown = [(quote(path), Path(path).name) for path in paths]
        return (
            gr.UploadButton(value=list(paths) or None),
            render("playground.images", self.t, images=shown) if shown else "",
        )

    def updates(
        self,
        talk: Conversation,
        mode: str,
        in_progress: bool = False,
        revealed: str = "",
        who: Mapping[str, str] | None = None,
    ) -> tuple[Any, ...]:
        """Returns the values of ``conversation_outputs``.

        After a vote, ``revealed`` is said, and ``who`` are the models behind A and B.
        """
        t = self.t
        names = {"base": t("playground.base"), "tuned": t("playground.mode_tuned")}
        for name, one in (("base", talk.other), ("tuned", talk.checkpoint)):
            if one is not None:
                names[name] = t("playground.tuned", which=checkpoint_label(one, t, short=True))
        left, right = names["base"], names["tuned"]
        if talk.blind:
            left, right = t("playground.side_a"), t("playground.side_b")
            if who is not None:
                left, right = f"{left}: {names[who['a']]}", f"{right}: {names[who['b']]}"
        ends = {{"left": left, "right": right}[side]: end for side, end in talk.ends.items()}
        voting = talk.ballot is not None and not in_progress
        reference = talk.reference
        return (
            gr.Chatbot(_chat_messages(talk.left), label=left, visible=mode != "tuned"),
            gr.Chatbot(_chat_messages(talk.right), label=right, visible=mode != "base"),
            answer_notes(ends, t) if ends and not in_progress else "",
            render("playground.reference", t, text=reference) if reference else "",
            gr.Column(visible=voting),
            revealed,
            gr.Button(interactive=in_progress),
            *[gr.Button(interactive=bool(talk.left or talk.right) and not in_progress)] * 3,
        )


def _chat_messages(turns: Turns) -> list[Any]:
    """Returns turns as Gradio shows them; an empty answer is named, not left blank."""
    shown = []
    for turn in turns:
        images = [{"path": path} for path in turn.get("images", ())]
        text = turn["content"] or ("" if images else "\u2026")
        shown.append({"role": turn["role"], "content": [*images, *([text] if text else [])]})
    return shown


def model_status(now: ModelStatus, reason: str, minutes: int, t: Texts) -> str:
    """Returns how the model is, or the reason why it cannot be used now."""
    what = t(f"playground.what_{_LOADING_KEYS.get(now.what, 'starting')}")
    text = t(
        f"playground.{now.phase}",
        what=what,
        time=format_duration(now.seconds, t),
        device=t("playground.device_cpu" if now.device == "cpu" else "playground.device_cuda"),
        memory=format_bytes(now.memory_bytes, t),
    )
    loaded = not reason and now.phase not in _SIGNS
    idle = [t("playground.idle_note", minutes=minutes)] if loaded else []
    return render(
        "playground.model_status",
        t,
        state="blocked" if reason else now.phase,
        sign="\u26a0" if reason else _SIGNS.get(now.phase, "\u25cf"),
        text=reason or text,
        notes=[*idle, *filter(None, now.notes)],
    )


def system_note(found: SystemPrompt, t: Texts) -> str:
    """Returns where the system prompt of a chat comes from."""
    key = "info" if not found.of else "none" if not found.text else "most"
    key = "all" if key == "most" and found.rows == found.of else key
    text = t(f"playground.system_{key}", rows=found.rows, of=found.of)
    return message("note", text, t, role="")


def answer_notes(ends: Mapping[str, AnswerChunk], t: Texts) -> str:
    """Returns how answers ended, by who gave them."""
    lines = []
    for who, piece in ends.items():
        kind = "stopped" if piece.stopped else "whole" if piece.ended else "cut"
        line = t(f"playground.note_{kind}", who=who, tokens=piece.tokens)
        speed = t("playground.speed", n=format_count(piece.speed, t)) if piece.speed else ""
        lines.append(f"{line} {speed}".strip())
    dropped = max((piece.dropped for piece in ends.values()), default=0)
    if dropped:
        lines.append(t("playground.note_dropped", n=dropped))
    return render("playground.answer_notes", t, lines=lines)


def vote_result(outcome: str, who: Mapping[str, str], t: Texts) -> str:
    """Returns whom a vote was for, and who was who."""
    sides = [
        t("playground.side_is", side=t(f"playground.side_{side}"), who=t(f"playground.who_{name}"))
        for side, name in who.items()
    ]
    text = f"{t(f'playground.voted_{outcome}')} {', '.join(sides)}."
    return message("revealed", text, t)


def button_label(text: str) -> str:
    """Returns text on one line, short enough for a button."""
    line = " ".join(text.split())
    return line if len(line) <= 90 else line[:89] + "\u2026"
