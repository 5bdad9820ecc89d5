"""A chat model that answers as the base or with any of its adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from transformers import StoppingCriteriaList

from lightning_peft import engine
from lightning_peft.chat.images import images_of, with_marks, with_tokens
from lightning_peft.chat.sampling import Sampling
from lightning_peft.chat.streaming import AnswerStreamer, StopRequested, StopTexts
from lightning_peft.data.end_tokens import end_tokens
from lightning_peft.data.image_templates import ImageRendering, image_template
from lightning_peft.data.image_tokens import ImageTokens
from lightning_peft.data.templates import Rendering, Template, check_variables, find_template
from lightning_peft.data.turn_keys import keys_without_effect
from lightning_peft.data.validation import EncodingProblem
from lightning_peft.errors import ConfigError, similar_names
from lightning_peft.export.adapters import BASE, Adapter
from lightning_peft.export.loading import LoadedModel
from lightning_peft.generation import (
    continuations,
    generate,
    kept_ready,
    without_settings_of_base,
)

Messages = Sequence[dict[str, Any]]
# Nothing that a template would say itself.
_MARK = "question7240"


@dataclass
class Answer:
    """What was generated."""

    text: str
    tokens: int
    # By the model itself.
    ended: bool
    # Turns of the conversation that were left out, as the model takes no more tokens.
    dropped: int = 0
    # Before its end, on request.
    stopped: bool = False


@dataclass
class ChatModel:
    """A loaded model, with a choice of who is speaking."""

    loaded: LoadedModel
    adapters: Sequence[Adapter]
    # As `chat_template` of the data; None takes that of the adapter's record, or else the
    # tokenizer's.
    chat_template_override: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    # Name of the adapter that speaks, or of the base.
    active: str = BASE
    # Values for variables of the chat template; None takes those of the adapter's record.
    variables_override: dict[str, Any] | None = None
    # What the model may call, as the chat template takes it.
    tools: list[dict[str, Any]] = field(default_factory=list)
    # What the processor does to images; None for a model of text. User's turns may have `images`
    # then, a list of the bytes of image files.
    images: ImageTokens | None = None
    # Why a model that sees can be shown none here.
    image_problem: str = ""
    # How much memory the weights take besides, laid out for generation.
    memory_note: str = field(default="", init=False)

    def __post_init__(self) -> None:
        lines: list[str] = []
        # As long as the model: its adapters do not change any more.
        self._kept = ExitStack()
        self._kept.enter_context(kept_ready(self.loaded.model, lines.append))
        self.memory_note = "".join(lines)
        if self.adapters and self.active == BASE:
            self.switch(self.adapters[0].name)

    @property
    def names(self) -> list[str]:
        """The names of all who can speak, the base first."""
        return [BASE, *(adapter.name for adapter in self.adapters)]

    def switch(self, name: str) -> None:
        """Chooses who speaks from now on; the conversation stays."""
        if name not in self.names:
            known = ", ".join(self.names)
            raise ConfigError(
                f"There is no adapter {name!r}{similar_names(name, self.names)}. "
                f"There are: {known}."
            )
        if name != BASE:
            engine.set_adapter(self.loaded.model, name)
        self.active = name

    @contextmanager
    def activated(self) -> Iterator[Any]:
        """Within the body, the model computes as the one who is active, without gradients."""
        model = self.loaded.model
        as_base = self.active == BASE and self.adapters
        with engine.disable_adapters(model) if as_base else nullcontext(), torch.no_grad():
            yield model

    @property
    def prompted_as(self) -> Adapter | None:
        """The adapter by whose record prompts are written; the base is asked as the first one."""
        active = (adapter for adapter in self.adapters if adapter.name == self.active)
        return next(active, self.adapters[0] if self.adapters else None)

    def require_images(self, what: str) -> ImageTokens:
        """Returns the processor's ways with images; ``what`` names the image, for messages."""
        if self.image_problem:
            raise ConfigError(f"{what} cannot be shown to the model: {self.image_problem}")
        if self.images is None:
            raise ConfigError(
                f"{what} cannot be shown to this model, which reads text alone: it was not "
                "trained on images (ImageTextToText), or is a language model."
            )
        return self.images

    def template(self) -> Template:
        """Returns the chat template of who is active."""
        adapter = self.prompted_as
        recorded = adapter.chat_template if adapter is not None else None
        requested = self.chat_template_override or recorded
        if self.images is not None:
            return image_template(self.images, requested)
        return find_template(self.loaded.tokenizer, requested)

    def variables(self) -> dict[str, Any]:
        """Returns the values for variables of the chat template, of who is active."""
        if self.variables_override is not None:
            return self.variables_override
        adapter = self.prompted_as
        return adapter.chat_template_kwargs if adapter is not None else {}

    def recorded(self, name: str, otherwise: Any) -> Any:
        """Returns how rows were encoded for the first adapter, as its record specifies."""
        known = (adapter.encoding.get(name) for adapter in self.adapters)
        return next((value for value in known if value is not None), otherwise)

    def tokens_of(self, messages: Messages) -> torch.Tensor:
        """Returns the ids of a conversation up to where the answer begins, ``(1, length)``."""
        if images_of(messages):
            self.require_images("An image of this conversation")
        tokenizer, variables = self.loaded.tokenizer, self.variables()
        kind = Rendering if self.images is None else ImageRendering
        rendering = kind(tokenizer, self.template(), variables)
        name = rendering.template.name
        check_variables(variables, f"the chat template {name}", rendering.variables)
        context = {"tools": self.tools} if self.tools else {}
        given = messages if self.images is None else list(map(with_marks, messages))
        try:
            turns = rendering.with_tool_arguments(given, context)
            text = rendering.text(turns, context, prompt=True)
            rendered = partial(rendering.text, prompt=True)
            lost = {key for _, key in keys_without_effect(rendered, turns, context)} & {
                "tools",
                "tool_calls",
            }
            if self.images is not None:
                text = with_tokens(self.images, text, images_of(messages))
        except EncodingProblem as problem:
            raise ConfigError(f"This conversation {problem}") from problem
        if lost:
            raise ConfigError(
                f"The conversation has {' and '.join(sorted(lost))}, and the chat template {name} "
                "writes nothing of it: the model would not know. Give a template that does with "
                "--chat-template."
            )
        ids = self.loaded.tokenizer(text, add_special_tokens=False, return_tensors="pt")
        input_ids: torch.Tensor = ids["input_ids"]
        return input_ids

    def prompt_affixes(self) -> tuple[str, str] | None:
        """Returns the text before and after a first question, without special tokens.

        Texts of the record, such as those in ``samples.jsonl``, have it around their questions.
        ``None`` where the template takes no question alone.
        """
        try:
            ids = self.tokens_of([{"role": "user", "content": _MARK}])
        except ConfigError:
            return None
        text = self.loaded.tokenizer.decode(ids[0], skip_special_tokens=True)
        before, mark, after = text.partition(_MARK)
        return (before, after) if mark else None

    def answer(
        self,
        messages: Messages,
        write: Callable[[str], None] = lambda text: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Generates the next turn; the oldest turns are left out where there are too many tokens.

        ``write`` takes each piece of the answer as soon as it is there; after each token, ``stop``
        is asked whether the answer is to end there.
        """
        kept, ids, dropped, room = self._fit_context(messages)
        tokenizer, texts = self.loaded.tokenizer, self.sampling.stop
        stop_texts = StopTexts(tokenizer, texts, ids.shape[1])
        streamer = AnswerStreamer(tokenizer, write, stop_texts)
        options = self._options() | {
            "max_new_tokens": min(self.sampling.max_new_tokens, room),
            "streamer": streamer,
            "stopping_criteria": StoppingCriteriaList([StopRequested(stop), stop_texts]),
        }
        with self.activated() as model, without_settings_of_base(model):
            out = generate(model, self._inputs_of(kept, ids), **options)
        new = out[0, ids.shape[1] :].tolist()
        by_token = bool(new) and new[-1] in options["eos_token_id"]
        ended = by_token or stop_texts.found
        stopped = not ended and stop()
        return Answer(streamer.text.strip(), len(new) - by_token, ended, dropped, stopped)

    def answers(
        self, conversations: Sequence[Messages], stop: Callable[[], bool] = lambda: False
    ) -> list[Answer]:
        """Generates the next turn of several conversations at once; see :meth:`answer`."""
        # Padding would be penalized as part of the prompt; each ends at texts of its own.
        alone = self.sampling.repetition_penalty != 1 or bool(self.sampling.stop)
        if alone or any(map(images_of, conversations)):
            return [self.answer(messages, stop=stop) for messages in conversations]
        options, longest = self._options(), self.sampling.max_new_tokens
        fitted = [self._fit_context(messages) for messages in conversations]
        # The others would be cut at lengths of their own.
        roomy = [place for place, (*_, room) in enumerate(fitted) if room >= longest]
        prompts = [fitted[place][1][0].tolist() for place in roomy]
        options["stopping_criteria"] = StoppingCriteriaList([StopRequested(stop)])
        with self.activated() as model, without_settings_of_base(model):
            found = continuations(
                model, prompts, options.pop("pad_token_id"), max_new_tokens=longest, **options
            )
        answers: dict[int, Answer] = {}
        for place, tokens in zip(roomy, found, strict=True):
            new = list(takewhile(lambda token: token not in options["eos_token_id"], tokens))
            text = self.loaded.tokenizer.decode(new, skip_special_tokens=True).strip()
            answers[place] = Answer(text, len(new), len(new) < len(tokens), fitted[place][2])
        return [
            answers[place] if place in answers else self.answer(messages, stop=stop)
            for place, messages in enumerate(conversations)
        ]

    def _options(self) -> dict[str, Any]:
        """Returns how tokens are chosen, and what ends an answer."""
        ends = _end_tokens(self.loaded.model, self.loaded.tokenizer)
        filler = self.loaded.tokenizer.pad_token_id
        return {
            **self.sampling.options(),
            "eos_token_id": ends,
            "pad_token_id": ends[0] if filler is None else filler,
        }

    def _inputs_of(self, messages: Messages, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the model's inputs for turns with these ids."""
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.images is None:
            return inputs
        try:
            seen = self.images.inputs([images_of(messages)])
        except EncodingProblem as problem:
            raise ConfigError(f"This conversation {problem}") from problem
        return {**inputs, **self.images.token_types(ids), **seen}

    def _fit_context(
        self, messages: Messages
    ) -> tuple[list[dict[str, Any]], torch.Tensor, int, int]:
        """Returns the turns that fit, their ids, how many turns do not, and the room after them."""
        limit = _longest(self.loaded)
        system = [m for m in messages[:1] if m["role"] == "system"]
        turns = list(messages[len(system) :])
        dropped = 0
        while True:
            kept = [*system, *turns]
            ids = self.tokens_of(kept)
            room = limit - ids.shape[1]
            more = sum(m["role"] == "user" for m in turns) > 1
            if room > 0 and (room >= min(self.sampling.max_new_tokens, limit // 4) or not more):
                return kept, ids, dropped, room
            if not more:
                raise ConfigError(
                    f"The question has {ids.shape[1]:,} tokens with its template, and the model "
                    f"takes {limit:,} together with its answer. Shorten it."
                )
            # A question with its answer, and the calls of tools between them.
            rest = next((i for i, m in enumerate(turns) if i and m["role"] == "user"), len(turns))
            turns, dropped = turns[rest:], dropped + rest


def _longest(loaded: LoadedModel) -> int:
    sizes = (
        getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None),
        getattr(loaded.tokenizer, "model_max_length", None),
    )
    return int(min((size for size in sizes if size), default=1 << 30))


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    tokens = end_tokens(model, tokenizer)
    if not tokens:
        raise ConfigError(
            "Neither the generation config nor the tokenizer of the base names an end token, so no "
            "answer would end. Set eos_token_id in its generation_config.json."
        )
    return tokens
