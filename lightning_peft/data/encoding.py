"""Turning samples into tokens, with labels on exactly the tokens that are to be learnt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

from lightning_peft.data.samples import Message, Sample
from lightning_peft.data.templates import Template
from lightning_peft.data.validation import EncodingProblem
from lightning_peft.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100

LossOn = Literal["assistant", "completion"]
OverLong = Literal["error", "truncate", "split"]
Span = tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """One row of training data.

    Attributes:
        input_ids: Tokens.
        labels: For each token itself, or -100 where it is not learnt. Models shift them.
        cut: Number of tokens that were cut off at the end.
        end_added: Whether the end-of-sequence token was added, as the template writes none.
    """

    input_ids: list[int]
    labels: list[int]
    cut: int = 0
    end_added: bool = False


class Encoder:
    """Encodes samples for a causal language model.

    Args:
        tokenizer: The tokenizer; it must have an end-of-sequence token.
        template: The chat template; ``None`` for plain text.
        max_length: Longest row in tokens.
        loss_on: ``"assistant"`` trains every assistant turn, ``"completion"`` the last one.
        over_long: What happens to longer rows: refuse, cut the end off, or (plain text) split.

    Raises:
        ConfigError: If the tokenizer has no end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template | None,
        max_length: int,
        loss_on: LossOn,
        over_long: OverLong,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"The tokenizer {tokenizer.name_or_path!r} has no end-of-sequence token, so a "
                "model cannot learn to stop. Set tokenizer.eos_token to the token that ends an "
                "answer, and save it."
            )
        self.tokenizer: Any = tokenizer
        self.end: int = tokenizer.eos_token_id
        self.template = template
        self.max_length = max_length
        self.loss_on = loss_on
        self.over_long = over_long
        self._marks = special_tokens(tokenizer)

    def encode(self, sample: Sample) -> list[Encoded]:
        """Returns the row that ``sample`` becomes, or several where a long text is split.

        Raises:
            EncodingProblem: If it cannot be trained on as it is.
        """
        if sample.text is not None:
            return self._text(sample.text)
        ids, spans = self._conversation(sample.messages)
        if self.loss_on == "completion":
            spans = spans[-1:]
        row = self._label(ids, spans)
        self._check_shares(row)
        return [self._fit(row)]

    def _ids(self, text: str, add_special_tokens: bool = False) -> list[int]:
        # Not verbose: long rows are counted here, and told with their numbers.
        found = self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        ids: list[int] = found["input_ids"]
        return ids

    def _text(self, text: str) -> list[Encoded]:
        ids = self._ids(text, add_special_tokens=True)
        added = ids[-1:] != [self.end]
        ids = [*ids, self.end] if added else ids
        if len(ids) > self.max_length and self.over_long == "split":
            starts = range(0, len(ids), self.max_length)
            pieces = [ids[start : start + self.max_length] for start in starts]
            # One token alone predicts nothing; it is the end token, and goes with its text.
            if len(pieces[-1]) == 1:
                pieces[-2:] = [pieces[-2][:-1], [pieces[-2][-1], *pieces[-1]]]
            return [Encoded(piece, [IGNORED, *piece[1:]], 0, added) for piece in pieces]
        return [self._fit(Encoded(ids, [IGNORED, *ids[1:]], 0, added))]

    def _conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[Span]]:
        assert self.template is not None
        if self.template.name != "raw" and self._marks is not None:
            for message in messages:
                found = self._marks.search(message["content"])
                if found:
                    raise EncodingProblem(
                        "control",
                        f"has the special token {found[0]!r} inside the text of its "
                        f"{message['role']} turn",
                    )
        if self.template.marks_answers:
            return self._marked(messages)
        return self._by_prefixes(messages)

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        assert self.template is not None
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), chat_template=self.template.text, **options
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise EncodingProblem(
                "template", f"is refused by the chat template {self.template.name}: {error}"
            ) from error

    def _marked(self, messages: Sequence[Message]) -> tuple[list[int], list[Span]]:
        found = self._apply(
            messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
        ids, mask = list(found["input_ids"]), [0, *found["assistant_masks"], 0]
        edges = [place for place in range(len(ids) + 1) if mask[place] != mask[place + 1]]
        return ids, list(zip(edges[::2], edges[1::2], strict=True))

    def _by_prefixes(self, messages: Sequence[Message]) -> tuple[list[int], list[Span]]:
        assert self.template is not None
        text = self._apply(messages, tokenize=False)
        places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if self.loss_on == "completion":
            places = places[-1:]
        characters = []
        for place in places:
            before = self._apply(messages[:place], tokenize=False, add_generation_prompt=True)
            upto = self._apply(messages[: place + 1], tokenize=False)
            if not text.startswith(upto):
                # Some templates end every text with the end token, whatever its last turn.
                upto = upto.rstrip().removesuffix(self.tokenizer.eos_token)
            if not (text.startswith(before) and text.startswith(upto)):
                way = "" if place == places[-1] else '; loss_on="completion" trains the last alone'
                raise EncodingProblem(
                    "template",
                    f"cannot be masked with the chat template {self.template.name}: it writes "
                    f"turn {place + 1}, or what comes before, in another way when more follows"
                    f"{way}",
                )
            characters.append((len(before), len(upto)))
        return self._tokens(text, characters)

    def _tokens(self, text: str, characters: Sequence[Span]) -> tuple[list[int], list[Span]]:
        if self.tokenizer.is_fast:
            found = self.tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            ids, offsets = found["input_ids"], found["offset_mapping"]
            spans = [_inside(offsets, first, last) for first, last in characters]
            whole = not any(a < last < b for _, last in characters for a, b in offsets)
            firsts = zip(characters, spans, strict=True)
            if whole and all(self._ids(text[: c[0]]) == ids[: s[0]] for c, s in firsts):
                return ids, spans
        # A token lies across the end of a prompt. When the model is asked, the prompt is tokenized
        # by itself, so it is here.
        return self._piecewise(text, characters)

    def _piecewise(self, text: str, characters: Sequence[Span]) -> tuple[list[int], list[Span]]:
        ids: list[int] = []
        spans = []
        done = 0
        for first, last in characters:
            ids += self._ids(text[done:first])
            start = len(ids)
            ids += self._ids(text[first:last])
            spans.append((start, len(ids)))
            done = last
        ids += self._ids(text[done:])
        whole = self._ids(text)
        if self.tokenizer.decode(ids) != self.tokenizer.decode(whole):
            raise EncodingProblem(
                "template",
                "has a token that lies across the end of its prompt, and the tokenizer writes the "
                "text in another way when it is parted there: let the prompt end without a space",
            )
        return ids, spans

    def _label(self, ids: list[int], spans: Sequence[Span]) -> Encoded:
        labels = [IGNORED] * len(ids)
        added = False
        for place, (start, stop) in enumerate(spans):
            last = place == len(spans) - 1
            # What the template writes after its answer has to be generated too, if the end token
            # comes after it.
            reach = len(ids) if last else stop + (ids[stop : stop + 1] == [self.end])
            end = ids.index(self.end, start, reach) + 1 if self.end in ids[start:reach] else None
            if end is None and last and stop > start:
                ids, labels, added = [*ids, self.end], [*labels, IGNORED], True
                end = len(ids)
            if last and end is not None:
                # What the template writes after the end is neither learnt nor read by anyone.
                ids, labels = ids[:end], labels[:end]
            end = stop if end is None else end
            labels[start:end] = ids[start:end]
        # The first token is predicted by nothing, and after packing by another example.
        labels[:1] = [IGNORED] * len(labels[:1])
        return Encoded(ids, labels, 0, added)

    def _check_shares(self, row: Encoded) -> None:
        assert self.template is not None
        trained = [label for label in row.labels if label != IGNORED]
        if not trained or trained == [self.end]:
            raise EncodingProblem(
                "untrained",
                f"has 0 % trained tokens with the chat template {self.template.name}",
            )
        if len(trained) >= len(row.labels) - 1:
            raise EncodingProblem(
                "all_trained",
                f"has 100 % trained tokens, its prompt too, with the chat template "
                f"{self.template.name}",
            )
        if self.end not in trained:
            raise EncodingProblem(
                "no_end",
                f"does not train the end token with the chat template {self.template.name}",
            )

    def _fit(self, row: Encoded) -> Encoded:
        length = len(row.input_ids)
        if length <= self.max_length:
            return row
        if self.over_long != "truncate":
            raise EncodingProblem("long", f"has {length:,} tokens of {self.max_length:,} allowed")
        labels = row.labels[: self.max_length]
        if all(label == IGNORED for label in labels):
            raise EncodingProblem(
                "untrained",
                f"has {length:,} tokens, and none of its answer is left after cutting to "
                f"{self.max_length:,}",
            )
        ids = row.input_ids[: self.max_length]
        return Encoded(ids, labels, length - self.max_length, row.end_added)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Returns what finds the special tokens of ``tokenizer`` in a text, if it has some."""
    marks = sorted(filter(None, tokenizer.all_special_tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, marks))) if marks else None


def _inside(offsets: Sequence[Span], first: int, last: int) -> Span:
    places = [i for i, (a, b) in enumerate(offsets) if a >= first and b <= last]
    return (places[0], places[-1] + 1) if places else (0, 0)
