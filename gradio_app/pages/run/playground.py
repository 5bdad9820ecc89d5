"""The playground: chat with a tuned model and its base, and blind votes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import gradio as gr

from gradio_app.chat import votes
from gradio_app.chat.command import unsupported_task
from gradio_app.chat.prompts import held_out_prompts, labels, system_prompt
from gradio_app.errors import UserError
from gradio_app.guards import escaped
from gradio_app.pages.error_reporting import localized_message, report_errors
from gradio_app.pages.layout import event_options, timer_options
from gradio_app.pages.run import playground_html
from gradio_app.pages.run.conversation import (
    Conversation,
    find_checkpoint,
    parse_request,
    step_of,
    stream_answers,
)
from gradio_app.pages.run.playground_view import PlaygroundView
from gradio_app.runs.types import Run
from gradio_app.studio import Studio
from gradio_app.texts import Texts
from gradio_app.visitors import owner_of

# How often the tab looks whether the model, the checkpoints or the machine have changed.
POLL_SECONDS = 2.0


def build(studio: Studio, t: Texts, run_id: gr.State) -> None:
    """Makes the tab."""
    PlaygroundTab(studio, t, run_id).bind()


class PlaygroundTab:
    """The tab, and what its buttons do."""

    def __init__(self, studio: Studio, t: Texts, run_id: gr.State) -> None:
        self.studio, self.t, self.run_id = studio, t, run_id
        self.talk = gr.State(Conversation())
        self._seen = gr.State(())
        self._timer = gr.Timer(POLL_SECONDS)
        self.parts = PlaygroundView(t)

    def bind(self) -> None:
        """Binds what the buttons do."""
        p, t = self.parts, self.t
        given = [self.run_id, self.talk, *p.settings]
        shown = [self.talk, *p.conversation_outputs, p.model_status]
        # The status is shown next to the model; a visitor who has to wait sees it at once.
        calm = {**event_options(), "show_progress": "hidden"}
        every = {**calm, "concurrency_limit": None}
        for event in (p.ask.click, p.question.submit):
            event(
                report_errors(t)(self._answer_handler),
                [p.question, *given],
                [p.question, *shown],
                **every,
            )
        for place, button in enumerate(p.prompts):
            button.click(
                report_errors(t)(self._prompt_handler(place)), given, [p.system, *shown], **every
            )
        p.clear_system.click(lambda: "", None, p.system, **calm)
        p.load.click(
            report_errors(t)(self._load), [self.run_id, p.checkpoint], p.model_status, **every
        )
        for button, act in ((p.unload, self._unload), (p.stop, self._stop)):
            button.click(report_errors(t)(act), self.run_id, p.model_status, **every)
        resets = (p.reset.click, p.mode.input, p.checkpoint.input, p.left.clear, p.right.clear)
        for event in resets:
            event(
                report_errors(t)(self._reset),
                p.settings,
                [self.talk, *p.conversation_outputs],
                **calm,
            )
        for name, button in p.votes.items():
            given = [self.run_id, self.talk]
            voted = [self.talk, *p.conversation_outputs, p.vote_summary]
            button.click(report_errors(t)(self._vote_handler(name)), given, voted, **every)
        looked = [self.run_id, p.checkpoint, self._seen]
        changing = [self._seen, *p.polled_outputs]
        self._timer.tick(self._poll, looked, changing, **timer_options())
        self.run_id.change(self._poll, looked, changing, **timer_options())

    def _run(self, run_id: Any, request: gr.Request) -> Run:
        owner = owner_of(request, self.studio.settings.space)
        return self.studio.store.get(owner, run_id)

    # Asking

    def _answer_handler(
        self, request: gr.Request, question: Any, run_id: Any, talk: Any, *values: Any
    ) -> Iterator[Any]:
        text = question if isinstance(question, str) else ""
        first = True
        for taken, shown in self._answer(request, text, run_id, talk, values):
            # What was written stays there if it cannot be asked. What is written while an answer
            # comes is the next question.
            yield (("" if first else gr.skip()) if taken else text, *shown)
            first = False

    def _prompt_handler(self, place: int) -> Callable[..., Iterator[Any]]:
        def ask(request: gr.Request, run_id: Any, talk: Any, *values: Any) -> Iterator[Any]:
            system = self._system_of(place, run_id, request)
            for _, shown in self._answer(request, place, run_id, talk, values):
                yield (system, *shown)
                system = gr.skip()

        return ask

    def _system_of(self, place: int, run_id: Any, request: gr.Request) -> Any:
        """Returns the system turn of a row that is asked, to be shown; its own may be none."""
        rows = held_out_prompts(self._run(run_id, request))
        known = place < len(rows) and rows[place].turns is not None
        return rows[place].system if known else gr.skip()

    def _answer(
        self, request: gr.Request, question: Any, run_id: Any, talk: Any, values: tuple[Any, ...]
    ) -> Iterator[tuple[bool, tuple[Any, ...]]]:
        """Yields whether a question was taken, and what is shown."""
        now = talk = talk if isinstance(talk, Conversation) else Conversation()
        mode, standing = str(values[0]), gr.skip()
        try:
            run = self._run(run_id, request)
            asked = parse_request(run, question, values)
            for _ in self.studio.chat.load(run.owner, run, asked.checkpoint):
                skips = (gr.skip(),) * len(self.parts.conversation_outputs)
                yield True, (gr.skip(), *skips, self._model_status(run))
            for now in stream_answers(self.studio.chat, run, talk, asked):
                shown = self.parts.updates(now, asked.mode, going_on=True)
                yield True, (now, *shown, self._model_status(run))
            standing = self._model_status(run)
        except UserError as refusal:
            self._warn(refusal)
            # The conversation is as before the question.
            yield False, (talk, *self.parts.updates(talk, mode), standing)
            return
        yield True, (now, *self.parts.updates(now, asked.mode), standing)

    def _warn(self, refusal: UserError) -> None:
        # An error would lie upon the conversation until it is clicked away.
        gr.Warning(localized_message(refusal, self.t), title=self.t("frame.refused"))

    def _reset(self, *values: Any) -> tuple[Any, ...]:
        mode, checkpoint = str(values[0]), str(values[1] or "")
        talk = Conversation(checkpoint=checkpoint, blind=mode == "blind")
        return (talk, *self.parts.updates(talk, mode))

    # The model

    def _load(self, run_id: Any, checkpoint: Any, request: gr.Request) -> Iterator[str]:
        run = self._run(run_id, request)
        try:
            for _ in self.studio.chat.load(run.owner, run, find_checkpoint(run, checkpoint)):
                yield self._model_status(run)
        except UserError as refusal:
            self._warn(refusal)
        yield self._model_status(run)

    def _unload(self, run_id: Any, request: gr.Request) -> str:
        run = self._run(run_id, request)
        self.studio.chat.unload(run.owner)
        gr.Info(self.t("playground.unloaded"))
        return self._model_status(run)

    def _stop(self, run_id: Any, request: gr.Request) -> str:
        run = self._run(run_id, request)
        self.studio.chat.stop(run.owner)
        return self._model_status(run)

    def _model_status(self, run: Run) -> str:
        speakers = self.studio.chat
        reason = speakers.reason(run.owner)
        said = localized_message(reason, self.t) if reason is not None else ""
        minutes = round(speakers.timeouts.idle / 60)
        return playground_html.model_status(speakers.model_status(run.owner), said, minutes, self.t)

    # Voting

    def _vote_handler(self, vote: str) -> Callable[..., tuple[Any, ...]]:
        def act(request: gr.Request, run_id: Any, talk: Any) -> tuple[Any, ...]:
            return self._record_vote(request, vote, run_id, talk)

        return act

    def _record_vote(
        self, request: gr.Request, vote: str, run_id: Any, talk: Any
    ) -> tuple[Any, ...]:
        run = self._run(run_id, request)
        ballot = talk.ballot if isinstance(talk, Conversation) else None
        try:
            if ballot is None:
                raise UserError("playground.refused_vote")
            outcome = votes.record_vote(run, ballot, vote)
        except UserError as refusal:
            self._warn(refusal)
            return (gr.skip(),) * (2 + len(self.parts.conversation_outputs))
        result = playground_html.vote_result(outcome, ballot.who, self.t)
        talk = replace(talk, blind=True, ballot=None)
        shown = self.parts.updates(talk, "blind", revealed=result, who=ballot.who)
        return (talk, *shown, self._tally(run, ballot.checkpoint))

    def _tally(self, run: Run, checkpoint: str) -> str:
        which = playground_html.checkpoint_label(checkpoint, step_of(run, checkpoint), self.t)
        return playground_html.vote_summary(votes.count_votes(run, checkpoint), which, self.t)

    # What changes by itself

    def _poll(self, run_id: Any, checkpoint: Any, seen: Any, request: gr.Request) -> list[Any]:
        try:
            run = self._run(run_id, request)
        except UserError:
            return [gr.skip()] * (1 + len(self.parts.polled_outputs))
        kind = unsupported_task(run)
        # Of a task that cannot be talked to, nothing is offered.
        known = [] if kind else run.checkpoints()
        nothing = (
            playground_html.unsupported(kind, self.t) if kind else playground_html.empty(self.t)
        )
        names = [one.name for one in known]
        chosen = checkpoint if checkpoint in names else next(iter(names), None)
        rows = held_out_prompts(run) if names else []
        texts = [playground_html.button_label([text]) for text in labels(rows)]
        standing = self._model_status(run) if names else ""
        free = bool(names) and self.studio.chat.reason(run.owner) is None
        phase = self.studio.chat.model_status(run.owner).phase
        vote_summary = self._tally(run, chosen) if chosen else ""
        choices = [
            (
                escaped(one.name)
                if one.step is None
                else self._checkpoint_label(one.name, one.step),
                one.name,
            )
            for one in known
        ]
        known_run = run.id if names else ""
        key = (
            known_run,
            chosen,
            tuple(choices),
            tuple(texts),
            standing,
            free,
            phase,
            vote_summary,
            kind,
        )
        if key == seen:
            return [gr.skip()] * (1 + len(self.parts.polled_outputs))
        # Once for each page, and then it is the visitor's.
        before = seen[0] if isinstance(seen, tuple) and seen else None
        system = system_prompt(run) if names and before != run.id else None
        parts = self.parts.changed(
            choices, chosen, texts, standing, free, phase, vote_summary, nothing, system
        )
        return [key, *parts]

    def _checkpoint_label(self, name: str, step: int) -> str:
        return self.t("playground.checkpoint_step", name=name, step=step)
