"""The components of the playground, and how a conversation is shown in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from gradio_app.chat.prompts import MAX_PROMPTS, SystemPrompt
from gradio_app.chat.request import MAX_NEW_TOKENS, MAX_TEMPERATURE, MAX_TEXT, Sampling
from gradio_app.chat.votes import VOTES
from gradio_app.pages.run import playground_html
from gradio_app.pages.run.conversation import MODES, Conversation, Turns
from gradio_app.texts import Texts

_HEIGHT = 440
# Answers that are code or JSON.
_MONO = """
() => document.querySelector('#try-columns').classList.toggle('mono')
"""


class PlaygroundView:
    """The components.

    Attributes:
        settings: What a question is asked with: mode, checkpoint, system turn, and sampling.
        talking: What shows a conversation.
        changing: What changes by itself.
    """

    def __init__(self, t: Texts) -> None:
        self.t = t
        self.empty = gr.HTML(playground_html.empty(t), elem_id="try-empty", padding=False)
        with gr.Column(elem_id="try-body", visible=False) as self.body:
            self._build_model()
            self._build_system()
            self._build_columns()
            self._build_question()
            sampling = self._build_settings()
            self.vote_summary = gr.HTML("", elem_id="try-tally", padding=False)
        self.settings: list[Any] = [self.mode, self.checkpoint, *sampling]
        self.conversation_outputs: list[Any] = [
            self.left,
            self.right,
            self.notes,
            self.reference,
            self.ballot,
            self.revealed,
            self.stop,
        ]
        self.polled_outputs: list[Any] = [
            self.empty,
            self.body,
            self.model_status,
            self.load,
            self.unload,
            self.checkpoint,
            self.held_out,
            *self.prompts,
            self.ask,
            self.vote_summary,
            self.system,
            self.system_note,
        ]

    def _build_model(self) -> None:
        t = self.t
        gr.HTML(f"<h2>{t('playground.state')}</h2>", padding=False)
        with gr.Row(elem_id="try-model", equal_height=True):
            self.model_status = gr.HTML("", elem_id="try-state", padding=False)
            self.load = gr.Button(t("playground.load"), elem_id="try-load", size="md", scale=0)
            self.unload = gr.Button(
                t("playground.unload"), elem_id="try-unload", size="md", scale=0, visible=False
            )
        with gr.Row(elem_id="try-choices"):
            self.mode = gr.Radio(
                [(t(f"playground.mode_{mode}"), mode) for mode in MODES],
                value="both",
                label=t("playground.mode"),
                info=t("playground.mode_info"),
                elem_id="try-mode",
                interactive=True,
                scale=2,
            )
            self.checkpoint = gr.Dropdown(
                [],
                label=t("playground.checkpoint"),
                elem_id="try-checkpoint",
                interactive=True,
                filterable=False,
                scale=1,
            )

    def _build_system(self) -> None:
        t = self.t
        with gr.Row(elem_id="try-system", equal_height=True):
            self.system = gr.Textbox(
                label=t("playground.system"),
                elem_id="try-system-prompt",
                max_lines=6,
                max_length=MAX_TEXT,
                interactive=True,
                scale=4,
            )
            self.clear_system = gr.Button(
                t("playground.system_clear"), elem_id="try-system-clear", size="md", scale=0
            )
        self.system_note = gr.HTML("", elem_id="try-system-note", padding=False)

    def _build_columns(self) -> None:
        t = self.t
        with gr.Column(elem_id="try-held-out", visible=False) as self.held_out:
            gr.HTML(f"<h2>{t('playground.held_out')}</h2>", padding=False)
            with gr.Row(elem_id="try-prompts"):
                self.prompts = [
                    gr.Button("", visible=False, size="md", elem_id=f"try-prompt-{place}")
                    for place in range(MAX_PROMPTS)
                ]
        gr.Checkbox(
            label=t("playground.mono"), elem_id="try-mono", interactive=True, container=False
        ).input(None, None, None, js=_MONO)
        with gr.Row(elem_id="try-columns"):
            self.left = self._column("try-left", t("playground.base"))
            self.right = self._column("try-right", t("playground.mode_tuned"))
        self.notes = gr.HTML("", elem_id="try-notes", padding=False)
        self.reference = gr.HTML("", elem_id="try-reference", padding=False)
        with gr.Column(elem_id="try-ballot", visible=False) as self.ballot:
            gr.HTML(f"<h2>{t('playground.which_better')}</h2>", padding=False)
            with gr.Row(elem_id="try-votes"):
                self.votes = {
                    vote: gr.Button(
                        t(f"playground.vote_{vote}"),
                        elem_id=f"try-vote-{vote.replace('_', '-')}",
                        size="md",
                    )
                    for vote in VOTES
                }
        self.revealed = gr.HTML("", elem_id="try-revealed", padding=False)

    def _column(self, name: str, label: str) -> gr.Chatbot:
        # As text: what a model says could be Markdown that fetches images from anywhere.
        return gr.Chatbot(
            [],
            label=label,
            elem_id=name,
            buttons=["copy"],
            render_markdown=False,
            placeholder=self.t("playground.nothing_said"),
            height=_HEIGHT,
            layout="bubble",
            min_width=280,
        )

    def _build_question(self) -> None:
        t = self.t
        with gr.Column(elem_id="try-asking"):
            self.question = gr.Textbox(
                label=t("playground.question"),
                info=t("playground.question_hint"),
                elem_id="try-question",
                max_lines=8,
                max_length=MAX_TEXT,
                interactive=True,
            )
            with gr.Row(elem_id="try-actions"):
                self.ask = gr.Button(
                    t("playground.ask"), variant="primary", elem_id="try-ask", size="lg", scale=0
                )
                self.stop = gr.Button(
                    t("playground.stop"), elem_id="try-stop", size="lg", scale=0, interactive=False
                )
                self.reset = gr.Button(
                    t("playground.reset"), elem_id="try-reset", size="lg", scale=0
                )

    def _build_settings(self) -> list[Any]:
        t, usual = self.t, Sampling()
        with gr.Accordion(t("playground.settings"), open=False, elem_id="try-settings"):
            with gr.Row():
                temperature = self._number("temperature", usual.temperature, 0, MAX_TEMPERATURE)
                top_p = self._number("top_p", usual.top_p, 0.05, 1)
            with gr.Row():
                length = gr.Number(
                    usual.max_new_tokens,
                    label=t("playground.length"),
                    minimum=1,
                    maximum=MAX_NEW_TOKENS,
                    precision=0,
                    interactive=True,
                )
                seed = gr.Number(
                    usual.seed,
                    label=t("playground.seed"),
                    info=t("playground.seed_info"),
                    minimum=0,
                    precision=0,
                    interactive=True,
                )
        return [self.system, temperature, top_p, length, seed]

    def _number(self, name: str, value: float, least: float, most: float) -> gr.Number:
        return gr.Number(
            value,
            label=self.t(f"playground.{name}"),
            info=self.t(f"playground.{name}_info"),
            minimum=least,
            maximum=most,
            step=0.05,
            interactive=True,
        )

    def updates(
        self,
        talk: Conversation,
        mode: str,
        going_on: bool = False,
        revealed: str = "",
        who: Mapping[str, str] | None = None,
    ) -> tuple[Any, ...]:
        """Returns the values of ``conversation_outputs``.

        Args:
            talk: The conversation.
            mode: Who answers.
            going_on: Whether more is to come.
            revealed: Text shown after a vote.
            who: The models behind A and B, once revealed.
        """
        t, which = self.t, playground_html.checkpoint_label(talk.checkpoint, talk.step, self.t)
        tuned = t("playground.tuned", which=which) if which else t("playground.mode_tuned")
        names = {"base": t("playground.base"), "tuned": tuned}
        left, right = names["base"], names["tuned"]
        if talk.blind:
            left, right = t("playground.side_a"), t("playground.side_b")
            if who is not None:
                left, right = f"{left}: {names[who['a']]}", f"{right}: {names[who['b']]}"
        ends = {{"left": left, "right": right}[side]: end for side, end in talk.ends.items()}
        voting = talk.ballot is not None and not going_on
        return (
            gr.Chatbot(_chat_messages(talk.left), label=left, visible=mode != "tuned"),
            gr.Chatbot(_chat_messages(talk.right), label=right, visible=mode != "base"),
            playground_html.answer_notes(ends, t) if ends and not going_on else "",
            playground_html.reference(talk.reference, t),
            gr.Column(visible=voting),
            revealed,
            gr.Button(interactive=going_on),
        )

    def changed(
        self,
        choices: Sequence[tuple[str, str]],
        chosen: str | None,
        texts: Sequence[str],
        standing: str,
        free: bool,
        phase: str,
        vote_summary: str,
        nothing: str,
        system: SystemPrompt | None,
    ) -> list[Any]:
        """Returns the values of ``changing``.

        ``nothing`` is said where there are no choices; ``system`` is ``None`` where the system
        prompt is the visitor's already.
        """
        there, resting = bool(choices), free and phase in ("none", "ready")
        prompts = [
            gr.Button(texts[place], visible=True, interactive=resting)
            if place < len(texts)
            else gr.Button(visible=False)
            for place in range(MAX_PROMPTS)
        ]
        return [
            gr.HTML(nothing, visible=not there),
            gr.Column(visible=there),
            standing,
            gr.Button(visible=phase == "none", interactive=free),
            gr.Button(visible=phase != "none"),
            gr.Dropdown(choices=list(choices), value=chosen),
            gr.Column(visible=bool(texts)),
            *prompts,
            gr.Button(interactive=resting),
            vote_summary,
            gr.skip() if system is None else system.text,
            gr.skip() if system is None else playground_html.system_note(system, self.t),
        ]


def _chat_messages(turns: Turns) -> list[Any]:
    """Returns turns as Gradio shows them; an empty answer is named, not left blank."""
    return [turn if turn["content"] else {**turn, "content": "\u2026"} for turn in turns]
