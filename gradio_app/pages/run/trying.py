"""Talking to what was trained, beside its base, and voting without knowing which is which."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import gradio as gr

from gradio_app.chat import votes
from gradio_app.chat.prompts import held_out_prompts, labels, system_prompt
from gradio_app.chat.support import unsupported_task
from gradio_app.errors import UserError
from gradio_app.guards import escaped
from gradio_app.pages.frame import private, quiet
from gradio_app.pages.handling import sentence, told
from gradio_app.pages.run import trying_html
from gradio_app.pages.run.trying_parts import Parts
from gradio_app.pages.run.trying_talk import Talk, answers, checked, find_checkpoint, step_of
from gradio_app.runs.store import Run
from gradio_app.studio import Studio
from gradio_app.texts import Texts
from gradio_app.visitors import owner_of

# How often the tab looks whether the model, the checkpoints or the machine have changed.
LOOK_SECONDS = 2.0


def build(studio: Studio, t: Texts, run_id: gr.State) -> None:
    """Makes the tab."""
    Trying(studio, t, run_id).bind()


class Trying:
    """The tab, and what its buttons do."""

    def __init__(self, studio: Studio, t: Texts, run_id: gr.State) -> None:
        self.studio, self.t, self.run_id = studio, t, run_id
        self.talk = gr.State(Talk())
        self._seen = gr.State(())
        self._timer = gr.Timer(LOOK_SECONDS)
        self.parts = Parts(t)

    def bind(self) -> None:
        """Binds what the buttons do."""
        p, t = self.parts, self.t
        given = [self.run_id, self.talk, *p.settings]
        shown = [self.talk, *p.talking, p.model_status]
        # What goes on stands in words beside the model. Who has to wait is told so at once.
        calm = {**private(), "show_progress": "hidden"}
        every = {**calm, "concurrency_limit": None}
        for event in (p.ask.click, p.question.submit):
            event(told(t)(self._ask), [p.question, *given], [p.question, *shown], **every)
        for place, button in enumerate(p.prompts):
            button.click(told(t)(self._placed(place)), given, [p.system, *shown], **every)
        p.clear_system.click(lambda: "", None, p.system, **calm)
        p.load.click(told(t)(self._load), [self.run_id, p.checkpoint], p.model_status, **every)
        for button, act in ((p.unload, self._unload), (p.stop, self._stop)):
            button.click(told(t)(act), self.run_id, p.model_status, **every)
        anew = (p.anew.click, p.mode.input, p.checkpoint.input, p.left.clear, p.right.clear)
        for event in anew:
            event(told(t)(self._anew), p.settings, [self.talk, *p.talking], **calm)
        for name, button in p.votes.items():
            given = [self.run_id, self.talk]
            voted = [self.talk, *p.talking, p.count_votes]
            button.click(told(t)(self._vote(name)), given, voted, **every)
        looked = [self.run_id, p.checkpoint, self._seen]
        changing = [self._seen, *p.changing]
        self._timer.tick(self._look, looked, changing, **quiet())
        self.run_id.change(self._look, looked, changing, **quiet())

    def _run(self, run_id: Any, request: gr.Request) -> Run:
        owner = owner_of(request, self.studio.settings.space)
        return self.studio.store.get(owner, run_id)

    # Asking

    def _ask(
        self, request: gr.Request, question: Any, run_id: Any, talk: Any, *values: Any
    ) -> Iterator[Any]:
        text = question if isinstance(question, str) else ""
        first = True
        for taken, shown in self._asking(request, text, run_id, talk, values):
            # What was written stays there if it cannot be asked. What is written while an answer
            # comes is the next question.
            yield (("" if first else gr.skip()) if taken else text, *shown)
            first = False

    def _placed(self, place: int) -> Callable[..., Iterator[Any]]:
        def ask(request: gr.Request, run_id: Any, talk: Any, *values: Any) -> Iterator[Any]:
            system = self._system_of(place, run_id, request)
            for _, shown in self._asking(request, place, run_id, talk, values):
                yield (system, *shown)
                system = gr.skip()

        return ask

    def _system_of(self, place: int, run_id: Any, request: gr.Request) -> Any:
        """Returns the system turn of a row that is asked, to be shown; its own may be none."""
        rows = held_out_prompts(self._run(run_id, request))
        known = place < len(rows) and rows[place].turns is not None
        return rows[place].system if known else gr.skip()

    def _asking(
        self, request: gr.Request, question: Any, run_id: Any, talk: Any, values: tuple[Any, ...]
    ) -> Iterator[tuple[bool, tuple[Any, ...]]]:
        """Yields whether a question was taken, and what is shown."""
        now = talk = talk if isinstance(talk, Talk) else Talk()
        mode, standing = str(values[0]), gr.skip()
        try:
            run = self._run(run_id, request)
            asked = checked(run, question, values)
            for _ in self.studio.chat.load(run.owner, run, asked.checkpoint):
                skips = (gr.skip(),) * len(self.parts.talking)
                yield True, (gr.skip(), *skips, self._standing(run))
            for now in answers(self.studio.chat, run, talk, asked):
                shown = self.parts.shown(now, asked.mode, going_on=True)
                yield True, (now, *shown, self._standing(run))
            standing = self._standing(run)
        except UserError as refusal:
            self._warn(refusal)
            # The conversation is as before the question.
            yield False, (talk, *self.parts.shown(talk, mode), standing)
            return
        yield True, (now, *self.parts.shown(now, asked.mode), standing)

    def _warn(self, refusal: UserError) -> None:
        # An error would lie upon the conversation until it is clicked away.
        gr.Warning(sentence(refusal, self.t), title=self.t("frame.refused"))

    def _anew(self, *values: Any) -> tuple[Any, ...]:
        mode, checkpoint = str(values[0]), str(values[1] or "")
        talk = Talk(checkpoint=checkpoint, blind=mode == "blind")
        return (talk, *self.parts.shown(talk, mode))

    # The model

    def _load(self, run_id: Any, checkpoint: Any, request: gr.Request) -> Iterator[str]:
        run = self._run(run_id, request)
        try:
            for _ in self.studio.chat.load(run.owner, run, find_checkpoint(run, checkpoint)):
                yield self._standing(run)
        except UserError as refusal:
            self._warn(refusal)
        yield self._standing(run)

    def _unload(self, run_id: Any, request: gr.Request) -> str:
        run = self._run(run_id, request)
        self.studio.chat.unload(run.owner)
        gr.Info(self.t("trying.unloaded"))
        return self._standing(run)

    def _stop(self, run_id: Any, request: gr.Request) -> str:
        run = self._run(run_id, request)
        self.studio.chat.stop(run.owner)
        return self._standing(run)

    def _standing(self, run: Run) -> str:
        speakers = self.studio.chat
        reason = speakers.reason(run.owner)
        said = sentence(reason, self.t) if reason is not None else ""
        minutes = round(speakers.patience.idle / 60)
        return trying_html.model_status(speakers.model_status(run.owner), said, minutes, self.t)

    # Voting

    def _vote(self, vote: str) -> Callable[..., tuple[Any, ...]]:
        def act(request: gr.Request, run_id: Any, talk: Any) -> tuple[Any, ...]:
            return self._voted(request, vote, run_id, talk)

        return act

    def _voted(self, request: gr.Request, vote: str, run_id: Any, talk: Any) -> tuple[Any, ...]:
        run = self._run(run_id, request)
        ballot = talk.ballot if isinstance(talk, Talk) else None
        try:
            if ballot is None:
                raise UserError("trying.refused_vote")
            outcome = votes.record_vote(run, ballot, vote)
        except UserError as refusal:
            self._warn(refusal)
            return (gr.skip(),) * (2 + len(self.parts.talking))
        told_now = trying_html.revealed(outcome, ballot.who, self.t)
        talk = replace(talk, blind=True, ballot=None)
        shown = self.parts.shown(talk, "blind", revealed=told_now, who=ballot.who)
        return (talk, *shown, self._tally(run, ballot.checkpoint))

    def _tally(self, run: Run, checkpoint: str) -> str:
        which = trying_html.which(checkpoint, step_of(run, checkpoint), self.t)
        return trying_html.count_votes(votes.count_votes(run, checkpoint), which, self.t)

    # What changes by itself

    def _look(self, run_id: Any, checkpoint: Any, seen: Any, request: gr.Request) -> list[Any]:
        try:
            run = self._run(run_id, request)
        except UserError:
            return [gr.skip()] * (1 + len(self.parts.changing))
        kind = unsupported_task(run)
        # Of a task that cannot be talked to, nothing is offered.
        known = [] if kind else run.checkpoints()
        nothing = trying_html.silent(kind, self.t) if kind else trying_html.empty(self.t)
        names = [one.name for one in known]
        chosen = checkpoint if checkpoint in names else next(iter(names), None)
        rows = held_out_prompts(run) if names else []
        texts = [trying_html.sentences([text]) for text in labels(rows)]
        standing = self._standing(run) if names else ""
        free = bool(names) and self.studio.chat.reason(run.owner) is None
        phase = self.studio.chat.model_status(run.owner).phase
        count_votes = self._tally(run, chosen) if chosen else ""
        choices = [
            (escaped(one.name) if one.step is None else self._stepped(one.name, one.step), one.name)
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
            count_votes,
            kind,
        )
        if key == seen:
            return [gr.skip()] * (1 + len(self.parts.changing))
        # Once for each page, and then it is the visitor's.
        before = seen[0] if isinstance(seen, tuple) and seen else None
        system = system_prompt(run) if names and before != run.id else None
        parts = self.parts.changed(
            choices, chosen, texts, standing, free, phase, count_votes, nothing, system
        )
        return [key, *parts]

    def _stepped(self, name: str, step: int) -> str:
        return self.t("trying.checkpoint_step", name=name, step=step)
