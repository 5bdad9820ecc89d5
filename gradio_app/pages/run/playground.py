"""Playground: chat with the tuned model and its base, and blind votes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import gradio as gr

from gradio_app.assets import script
from gradio_app.chat import votes
from gradio_app.chat.command import sees_images, unsupported_task
from gradio_app.chat.prompts import MAX_PROMPTS, MAX_SCORED, held_out_prompts, labels, system_prompt
from gradio_app.chat.request import PRESETS, validate_images
from gradio_app.errors import UserError
from gradio_app.pages.components import Update, changed_updates, on_event, timer_options
from gradio_app.pages.error_reporting import localized_message
from gradio_app.pages.run import playground_view
from gradio_app.pages.run.conversation import (
    ChatInputs,
    Conversation,
    Question,
    find_checkpoint,
    opened_row,
    parse_request,
    saved_row,
    stream_answers,
    without_last,
)
from gradio_app.pages.run.playground_view import PlaygroundView
from gradio_app.pages.run.score import score_handler
from gradio_app.pages.run_state import checkpoint_label
from gradio_app.pages.templating import render
from gradio_app.runs.types import Checkpoint, Run
from gradio_app.studio import Studio
from gradio_app.texts import Texts

# How often the tab looks whether the model, the checkpoints or the machine have changed.
POLL_SECONDS = 2.0
_SAVE = script("save_text.js")


class PlaygroundTab:
    """The tab, and what its buttons do."""

    def __init__(self, studio: Studio, t: Texts, run_id: gr.State) -> None:
        self.studio, self.t, self.run_id = studio, t, run_id
        self.talk = gr.State(Conversation())
        self._seen = gr.State("")
        self._timer = gr.Timer(POLL_SECONDS)
        self.parts = PlaygroundView(t)

    def bind(self) -> None:
        """Binds what the buttons do."""
        p, t = self.parts, self.t
        talk = [self.talk, *p.conversation_outputs]
        given, shown = [self.run_id, self.talk, *p.settings], [*talk, p.model_status]
        # The status is shown next to the model; a visitor who has to wait sees it at once.
        calm: dict[str, Any] = {"show_progress": "hidden"}
        every = {**calm, "concurrency_limit": None}
        asks = (p.ask.click, p.question.submit)
        given_images, asked = [p.question, p.images, *given], [p.question, *p.image_outputs]
        on_event(t, asks, self._answer_handler, given_images, [*asked, *shown], **every)
        on_event(t, p.images.upload, self._show_images, p.images, p.image_outputs, **calm)
        no_images = partial(p.image_updates, ())
        on_event(t, p.clear_images.click, no_images, None, p.image_outputs, **calm)
        for place, button in enumerate(p.prompts):
            handler = self._prompt_handler(place)
            on_event(t, button.click, handler, given, [p.system, *shown], **every)
        on_event(t, p.clear_system.click, lambda: "", None, p.system, **calm)
        on_event(t, p.again.click, self._again, given, [p.seed, *shown], **every)
        on_event(t, p.edit.click, self._edit, [self.talk, p.mode], [*asked, *talk], **calm)
        on_event(t, p.save.click, self._save, [self.talk, p.system], p.saved).success(
            None, p.saved, None, js=_SAVE
        )
        on_event(t, p.open.upload, self._open, [p.open, p.mode], [p.system, *talk], **calm)
        for name, button in p.presets.items():
            on_event(t, button.click, partial(list, PRESETS[name]), None, p.preset_outputs, **calm)
        checkpoint = [self.run_id, p.checkpoint]
        on_event(t, p.load.click, self._load, checkpoint, p.model_status, **every)
        on_event(t, p.unload.click, self._unload, self.run_id, p.model_status, **every)
        stops = (p.stop.click, p.score.stop.click)
        on_event(t, stops, self._stop, self.run_id, p.model_status, **every)
        score = score_handler(self.studio, p.score, self._model_status, self._warn)
        scored = [self.run_id, p.score.rows, *p.settings]
        shows = [*p.score.outputs, p.model_status]
        on_event(t, p.score.start.click, score, scored, shows, **every)
        resets = (
            p.reset.click,
            p.mode.input,
            p.checkpoint.input,
            p.other.input,
            p.left.clear,
            p.right.clear,
        )
        on_event(t, resets, self._reset, [self.run_id, *p.settings], talk, **calm)
        for name, button in p.votes.items():
            voted = [*talk, p.vote_summary]
            on_event(t, button.click, self._vote_handler(name), given[:2], voted, **every)
        for event in (self._timer.tick, self.run_id.change):
            changing = [self._seen, *p.polled_outputs]
            event(self._poll, [*checkpoint, self._seen], changing, **timer_options())

    # Asking

    def _answer_handler(
        self, request: gr.Request, text: Any, images: Any, run_id: Any, talk: Any, *values: Any
    ) -> Iterator[Any]:
        text = text if isinstance(text, str) else ""
        kept = (text, *(gr.skip(),) * 2)
        cleared: tuple[Any, ...] = ("", *self.parts.image_updates(()))
        for taken, shown in self._answer(request, text, run_id, talk, ChatInputs(*values), images):
            # What was written stays there if it cannot be asked. What is written while an answer
            # comes is the next question.
            yield (*(cleared if taken else kept), *shown)
            kept = (text, *self.parts.image_updates(images or ()))
            cleared = (gr.skip(),) * 3

    def _prompt_handler(self, place: int) -> Callable[..., Iterator[Any]]:
        def ask(request: gr.Request, run_id: Any, talk: Any, *values: Any) -> Iterator[Any]:
            rows = held_out_prompts(self.studio.run(request, run_id))
            known = place < len(rows) and rows[place].turns is not None
            # The system turn of a row that is asked is shown; its own may be none.
            system: Any = rows[place].system if known else gr.skip()
            for _, shown in self._answer(request, place, run_id, talk, ChatInputs(*values)):
                yield (system, *shown)
                system = gr.skip()

        return ask

    def _again(
        self, request: gr.Request, run_id: Any, talk: Any, *values: Any
    ) -> Iterator[tuple[Any, ...]]:
        """Asks the last question again; where chance decides, with the next seed."""
        before = talk if isinstance(talk, Conversation) else Conversation()
        talk, question = without_last(before)
        inputs = ChatInputs(*values)
        drawn = isinstance(inputs.seed, (int, float)) and inputs.temperature not in (0, None)
        seed: Any = inputs.seed + 1 if drawn else gr.skip()
        if drawn:
            inputs = inputs._replace(seed=seed)
        # A row of the data has turns before its question, and an answer that is shown.
        asked = before.row or question
        for taken, shown in self._answer(request, asked, run_id, talk, inputs):
            if taken:
                yield (seed, *shown)
            else:
                updates = self.parts.updates(before, str(inputs.mode))
                yield (gr.skip(), before, *updates, shown[-1])

    def _edit(self, talk: Any, mode: Any) -> tuple[Any, ...]:
        """Takes the last question and its images back into their fields."""
        before = talk if isinstance(talk, Conversation) else Conversation()
        shorter, question = without_last(before)
        images = self.parts.image_updates(question.images)
        return (question.text, *images, shorter, *self.parts.updates(shorter, str(mode)))

    def _save(self, talk: Any, system: Any) -> str:
        return saved_row(talk if isinstance(talk, Conversation) else Conversation(), system)

    def _open(self, file: Any, mode: Any) -> tuple[Any, ...]:
        system, talk = opened_row(file)
        return (system, talk, *self.parts.updates(talk, str(mode)))

    def _show_images(self, images: Any) -> tuple[Any, ...]:
        try:
            return self.parts.image_updates(validate_images(images))
        except UserError as refusal:
            self._warn(refusal)
            return self.parts.image_updates(())

    def _answer(
        self,
        request: gr.Request,
        question: Any,
        run_id: Any,
        talk: Any,
        inputs: ChatInputs,
        images: Any = None,
    ) -> Iterator[tuple[bool, tuple[Any, ...]]]:
        """Yields whether a question was taken, and what is shown."""
        now = talk = talk if isinstance(talk, Conversation) else Conversation()
        status: Any = gr.skip()
        try:
            run = self.studio.run(request, run_id)
            if isinstance(question, str):
                question = Question(question, validate_images(images))
            asked = parse_request(run, question, inputs)
            for _ in self.studio.chat.load(run.owner, run, *asked.names):
                skips = (gr.skip(),) * len(self.parts.conversation_outputs)
                yield True, (gr.skip(), *skips, self._model_status(run))
            for now in stream_answers(self.studio.chat, run, talk, asked):
                shown = self.parts.updates(now, asked.mode, in_progress=True)
                yield True, (now, *shown, self._model_status(run))
            status = self._model_status(run)
        except UserError as refusal:
            self._warn(refusal)
            # The conversation is as before the question.
            yield False, (talk, *self.parts.updates(talk, str(inputs.mode)), status)
            return
        yield True, (now, *self.parts.updates(now, asked.mode), status)

    def _warn(self, refusal: UserError) -> None:
        # An error would lie upon the conversation until it is clicked away.
        gr.Warning(localized_message(refusal, self.t), title=self.t("frame.refused"))

    def _reset(self, request: gr.Request, run_id: Any, *values: Any) -> tuple[Any, ...]:
        inputs = ChatInputs(*values)
        try:
            run = self.studio.run(request, run_id)
            checkpoint: Checkpoint | None = find_checkpoint(run, inputs.checkpoint)
            other = find_checkpoint(run, inputs.other) if inputs.other else None
        except UserError:
            # The run or checkpoint is gone; a reset empties the page all the same.
            checkpoint = other = None
        talk = Conversation(checkpoint, other, blind=inputs.mode == "blind")
        return (talk, *self.parts.updates(talk, str(inputs.mode)))

    # The model

    def _load(self, run_id: Any, checkpoint: Any, request: gr.Request) -> Iterator[str]:
        run = self.studio.run(request, run_id)
        try:
            for _ in self.studio.chat.load(run.owner, run, find_checkpoint(run, checkpoint).name):
                yield self._model_status(run)
        except UserError as refusal:
            self._warn(refusal)
        yield self._model_status(run)

    def _unload(self, run_id: Any, request: gr.Request) -> str:
        run = self.studio.run(request, run_id)
        self.studio.chat.unload(run.owner)
        gr.Info(self.t("playground.unloaded"))
        return self._model_status(run)

    def _stop(self, run_id: Any, request: gr.Request) -> str:
        run = self.studio.run(request, run_id)
        self.studio.chat.stop(run.owner)
        return self._model_status(run)

    def _model_status(self, run: Run) -> str:
        chat = self.studio.chat
        reason = chat.reason(run.owner)
        text = localized_message(reason, self.t) if reason is not None else ""
        minutes = round(chat.timeouts.idle / 60)
        return playground_view.model_status(chat.model_status(run.owner), text, minutes, self.t)

    # Voting

    def _vote_handler(self, vote: str) -> Callable[..., tuple[Any, ...]]:
        def act(request: gr.Request, run_id: Any, talk: Any) -> tuple[Any, ...]:
            run = self.studio.run(request, run_id)
            ballot = talk.ballot if isinstance(talk, Conversation) else None
            try:
                if ballot is None:
                    raise UserError("playground.refused_vote")
                outcome = votes.record_vote(run, ballot, vote)
            except UserError as refusal:
                self._warn(refusal)
                return (gr.skip(),) * (2 + len(self.parts.conversation_outputs))
            result = playground_view.vote_result(outcome, ballot.who, self.t)
            voted = replace(talk, blind=True, ballot=None)
            shown = self.parts.updates(voted, "blind", revealed=result, who=ballot.who)
            return (voted, *shown, self._vote_summary(run, talk.checkpoint))

        return act

    def _vote_summary(self, run: Run, checkpoint: Checkpoint) -> str:
        which = checkpoint_label(checkpoint, self.t, short=True)
        counts = votes.count_votes(run, checkpoint.name)
        return render("playground.vote_summary", self.t, which=which, counts=counts)

    # What changes by itself

    def _poll(self, run_id: Any, checkpoint: Any, seen: Any, request: gr.Request) -> list[Any]:
        try:
            run = self.studio.run(request, run_id)
        except UserError:
            return [gr.skip()] * (1 + len(self.parts.polled_outputs))
        known, values = changed_updates(self._polled_updates(run, checkpoint), seen)
        return [known, *values]

    def _polled_updates(self, run: Run, checkpoint: Any) -> list[Update]:
        """Returns the updates of ``polled_outputs``."""
        t, chat, kind = self.t, self.studio.chat, unsupported_task(run)
        # Of a task that cannot be talked to, nothing is offered.
        known = [] if kind else run.checkpoints()
        there = bool(known)
        chosen = next((one for one in known if one.name == checkpoint), known[0] if known else None)
        choices = tuple((checkpoint_label(one, t), one.name) for one in known)
        others = ((t("playground.base"), ""), *choices)
        name = chosen.name if chosen else None
        nothing = (
            render("playground.unsupported", t, kind=kind)
            if kind
            else render("playground.empty", t)
        )
        phase, free = chat.model_status(run.owner).phase, there and chat.reason(run.owner) is None
        resting = free and phase in ("none", "ready")
        rows = held_out_prompts(run, MAX_SCORED) if there else []
        shown = labels(rows[:MAX_PROMPTS])
        scored = sum(row.turns is not None for row in rows)
        alone = t("playground.image_alone")
        texts = [playground_view.button_label(text) or alone for text in shown]
        prompts: list[Update] = [
            (gr.Button(text, visible=True, interactive=resting), (text, resting)) for text in texts
        ]
        hidden, sees = gr.Button(visible=False), sees_images(run)
        system = system_prompt(run) if there else None
        # Once for each run, and then it is the visitor's.
        system_key = run.id if there else ""
        return [
            (gr.HTML(nothing, visible=not there), (nothing, there)),
            (gr.Column(visible=there), there),
            self._model_status(run) if there else "",
            (gr.Button(visible=phase == "none", interactive=free), (phase == "none", free)),
            (gr.Button(visible=phase != "none"), phase != "none"),
            (gr.Dropdown(choices=list(choices), value=name), (choices, name)),
            (gr.Dropdown(choices=list(others), visible=len(choices) > 1), others),
            (gr.Column(visible=bool(texts)), bool(texts)),
            *prompts,
            *[(hidden, None)] * (MAX_PROMPTS - len(prompts)),
            (gr.Button(interactive=resting), resting),
            (gr.Row(visible=sees), sees),
            self._vote_summary(run, chosen) if chosen else "",
            (system.text if system else gr.skip(), system_key),
            (playground_view.system_note(system, t) if system else gr.skip(), system_key),
            *self.parts.score.polled_updates(scored, resting),
        ]
