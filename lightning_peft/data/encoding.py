"""Tokenization of samples, with labels on the trained tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from lightning_peft.data.conversation_text import ConversationText, LossOn, Part, Span
from lightning_peft.data.json_text import texts_in
from lightning_peft.data.row_encoder import IGNORED as IGNORED
from lightning_peft.data.row_encoder import SpecialTokens, end_token_id
from lightning_peft.data.samples import Message, Sample
from lightning_peft.data.templates import Rendering, Template, check_variables
from lightning_peft.data.turn_keys import TurnKeys
from lightning_peft.data.turns import Reasoning, reasoning_texts
from lightning_peft.data.validation import EncodingProblem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


OverLong = Literal["error", "truncate", "split"]


@dataclass(frozen=True)
class TextSpan:
    """A piece of a row, trained or not.

    ``tokens`` are in the tokenizer's own spelling. ``image`` is a small copy of the image that it
    is, ``audio`` the beginning of the recording, as ``data:`` URLs.
    """

    trained: bool
    text: str
    tokens: list[str]
    image: str | None = None
    audio: str | None = None


def token_spans(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], labels: Sequence[int]
) -> list[TextSpan]:
    """Returns a row of tokens in runs of those with a label and those without."""
    reads: Any = tokenizer
    spans = []
    pairs = zip(ids, labels, strict=True)
    for trained, group in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        tokens = [token for token, _ in group]
        text = reads.decode(tokens, clean_up_tokenization_spaces=False)
        spans.append(TextSpan(trained, text, reads.convert_ids_to_tokens(tokens)))
    return spans


@dataclass(frozen=True)
class Encoded:
    """One row of training data.

    Labels are tokens, not shifted, or -100. ``cut`` tokens were cut off at the end; ``end_added``
    indicates whether the end-of-sequence token was added, as the template has none.
    """

    input_ids: list[int]
    labels: list[int]
    cut: int = 0
    end_added: bool = False


class Encoder:
    """Encodes samples for a causal language model; ``template`` is ``None`` for plain text.

    The other arguments are those of :class:`~lightning_peft.data.supervised.SupervisedData`.

    Raises:
        ConfigError: If the tokenizer has no end-of-sequence token, or the template does not use
            one of ``variables``.
    """

    rendering_class: ClassVar[type[Rendering]] = Rendering

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template | None,
        max_length: int,
        loss_on: LossOn,
        over_long: OverLong,
        reasoning: Reasoning = "train",
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer: Any = tokenizer
        self.end = end_token_id(tokenizer)
        self.template = template
        self.max_length = max_length
        self.over_long = over_long
        self._special_tokens = SpecialTokens(tokenizer)
        if template is None:
            check_variables(variables or {}, "plain text", frozenset())
            return
        self._rendering = self.rendering_class(tokenizer, template, variables)
        check_variables(
            variables or {}, f"the chat template {template.name}", self._rendering.variables
        )
        self._texts = ConversationText(self._rendering, loss_on, reasoning)
        self._keys = TurnKeys(self._texts)

    @property
    def variables(self) -> frozenset[str] | None:
        """Names that the chat template reads next to the turns; ``None`` for plain text."""
        return None if self.template is None else self._rendering.variables

    def encode(self, sample: Sample) -> list[Encoded]:
        """Returns the row that ``sample`` becomes, or raises an :class:`EncodingProblem`.

        Several, where a long text is split, or where the template renders earlier turns differently
        from the way they are generated: each answer is trained as it is generated.
        """
        if sample.text is not None:
            return self._text(sample.text)
        turns = self._texts.turns(sample.messages, sample.context)
        self._check_special_tokens(turns, sample.context)
        return [
            self._fit_to_length(self._row(ids, spans, hidden, read, sample.context))
            for read, ids, spans, hidden in self._conversation(turns, sample.context)
        ]

    def _row(
        self,
        ids: list[int],
        spans: Sequence[Span],
        hidden: Sequence[Span],
        turns: Sequence[Message],
        context: Mapping[str, Any],
    ) -> Encoded:
        row = self._label(ids, spans)
        for first, last in hidden:
            row.labels[first:last] = [IGNORED] * (min(last, len(row.labels)) - first)
        self._check_trained_fraction(row)
        self._texts.check_contents(turns, context)
        return row

    def prompt(self, sample: Sample) -> list[int]:
        """Returns the tokens of turns that end with a question, up to where an answer begins."""
        turns = self._texts.turns(sample.messages, sample.context)
        self._check_special_tokens(turns, sample.context)
        ids = self._ids(self._rendering.text(turns, sample.context, prompt=True))
        if len(ids) > self.max_length:
            raise EncodingProblem("long", f"has {len(ids):,} tokens of {self.max_length:,} allowed")
        return ids

    def unused(self, sample: Sample) -> list[str]:
        """Returns the keys of turns that change nothing; refuses keys that would, if rendered."""
        if sample.text is not None:
            return []
        return self._keys.unused(sample.messages, sample.context)

    def _ids(self, text: str, add_special_tokens: bool = False) -> list[int]:
        # Not verbose: long rows are counted here, and reported with their numbers.
        found = self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        return list(found["input_ids"])

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
        return [self._fit_to_length(Encoded(ids, [IGNORED, *ids[1:]], 0, added))]

    def _check_special_tokens(self, turns: Sequence[Message], context: Mapping[str, Any]) -> None:
        assert self.template is not None
        if self.template.name == "raw":
            return
        for what, value in [*((f"{turn['role']} turn", turn) for turn in turns), *context.items()]:
            for text in texts_in(value):
                self._special_tokens.check(text, what)

    def _conversation(
        self, turns: list[Message], context: Mapping[str, Any]
    ) -> Iterator[tuple[list[Message], list[int], list[Span], list[Span]]]:
        """Yields turns and tokens of each text, its answers, and what of them is not learnt."""
        assert self.template is not None
        plain = not any("train" in turn or reasoning_texts(turn) for turn in turns)
        if self.template.marks_answers and plain:
            ids, mask = self._masked(turns, context)
            spans = _runs(mask, 0, len(mask))
            requested = self._texts.trained(turns)
            answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
            # One that marks the prompts too is refused later.
            if all(mask) or self._are_answers([ids[first:last] for first, last in spans], answers):
                yield turns, ids, spans[len(spans) - len(requested) :], []
                return
        for part in self._texts.parts(turns, context):
            read = self._texts.with_masked_reasoning(part, context)
            ids, spans, hidden, _ = self._part(read, context)
            yield part.messages, ids, spans, hidden

    def _are_answers(self, pieces: Sequence[Sequence[int]], answers: Sequence[Any]) -> bool:
        """Whether what a template marks as generated is each answer, and no other turn."""
        if len(pieces) != len(answers):
            return False
        # Cleaned up, " ." would be "." in the text, and not in the answer.
        texts = (self.tokenizer.decode(p, clean_up_tokenization_spaces=False) for p in pieces)
        pairs = zip(texts, answers, strict=True)
        return all(isinstance(a, str) and a.strip() in text for text, a in pairs)

    def _part(
        self, part: Part, context: Mapping[str, Any]
    ) -> tuple[list[int], list[Span], list[Span], list[Span]]:
        """Returns tokens, those of answers and of what is hidden, and characters of each."""
        assert self.template is not None
        characters = [part.answers[place] for place in sorted(part.answers)]
        if not self.template.marks_answers:
            ids, spans, offsets = self._tokens(part.text, characters)
        else:
            ids, mask = self._masked(part.messages, context)
            offsets = self._offsets(part.text, 0)[1]
            places = [overlapping_tokens(offsets, first, last) for first, last in characters]
            spans = [run for first, last in places for run in _runs(mask, first, last)]
        if part.hidden and not self.tokenizer.is_fast:
            raise EncodingProblem(
                "thoughts",
                'has thoughts, which reasoning="mask" can only find with a fast tokenizer',
            )
        hidden = [overlapping_tokens(offsets, first, last) for first, last in part.hidden]
        return ids, spans, hidden, offsets

    def _masked(
        self, turns: Sequence[Message], context: Mapping[str, Any]
    ) -> tuple[list[int], list[int]]:
        """Returns tokens, and 1 for each that the template marks as generated."""
        found = self._rendering.apply(
            turns,
            context,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
        return list(found["input_ids"]), list(found["assistant_masks"])

    def _offsets(self, piece: str, start: int) -> tuple[list[int], list[Span]]:
        """Returns tokens of a piece of a text, with their characters in the text."""
        if not self.tokenizer.is_fast:
            return self._ids(piece), []
        found = self.tokenizer(
            piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return found["input_ids"], [(a + start, b + start) for a, b in found["offset_mapping"]]

    def _tokens(
        self, text: str, characters: Sequence[Span]
    ) -> tuple[list[int], list[Span], list[Span]]:
        """Returns tokens, those of the answers, and the characters of each token."""
        if self.tokenizer.is_fast:
            ids, offsets = self._offsets(text, 0)
            spans = [_inside(offsets, first, last) for first, last in characters]
            whole = not any(a < last < b for _, last in characters for a, b in offsets)
            firsts = zip(characters, spans, strict=True)
            if whole and all(self._ids(text[: c[0]]) == ids[: s[0]] for c, s in firsts):
                return ids, spans, offsets
        # A token lies across the end of a prompt. When the model is asked, the prompt is tokenized
        # by itself, so it is here.
        return self._piecewise(text, characters)

    def _piecewise(
        self, text: str, characters: Sequence[Span]
    ) -> tuple[list[int], list[Span], list[Span]]:
        ids: list[int] = []
        spans: list[Span] = []
        offsets: list[Span] = []
        edges = [0, *(edge for span in characters for edge in span), len(text)]
        for place, (first, last) in enumerate(zip(edges, edges[1:], strict=False)):
            found, where = self._offsets(text[first:last], first)
            if place % 2:
                spans.append((len(ids), len(ids) + len(found)))
            ids, offsets = [*ids, *found], [*offsets, *where]
        whole = self._ids(text)
        if self.tokenizer.decode(ids) != self.tokenizer.decode(whole):
            raise EncodingProblem(
                "template",
                "has a token that lies across the end of its prompt, and the tokenizer writes the "
                "text in another way when it is parted there: let the prompt end without a space",
            )
        return ids, spans, offsets

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

    def _check_trained_fraction(self, row: Encoded) -> None:
        assert self.template is not None
        trained = [label for label in row.labels if label != IGNORED]
        if not trained or trained == [self.end]:
            kind, problem = "untrained", "has 0 % trained tokens"
        elif len(trained) >= len(row.labels) - 1:
            kind, problem = "all_trained", "has 100 % trained tokens, its prompt too,"
        elif self.end not in trained:
            kind, problem = "no_end", "does not train the end token"
        else:
            return
        raise EncodingProblem(kind, f"{problem} with the chat template {self.template.name}")

    def _fit_to_length(self, row: Encoded) -> Encoded:
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


def _inside(offsets: Sequence[Span], first: int, last: int) -> Span:
    places = [i for i, (a, b) in enumerate(offsets) if a >= first and b <= last]
    return (places[0], places[-1] + 1) if places else (0, 0)


def overlapping_tokens(offsets: Sequence[Span], first: int, last: int) -> Span:
    """Returns the tokens that hold any of some characters."""
    places = [i for i, (a, b) in enumerate(offsets) if a < last and b > first]
    return (places[0], places[-1] + 1) if places else (0, 0)


def _runs(mask: Sequence[int], first: int, last: int) -> list[Span]:
    """Returns where a mask is 1 between two of its places."""
    padded = [0, *mask[first:last], 0]
    edges = [first + i for i in range(len(padded) - 1) if padded[i] != padded[i + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))
