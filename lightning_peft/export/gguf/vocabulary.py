"""Tokenizers in GGUF, only where llama.cpp gives the same token ids.

llama.cpp knows the splitting of text into words by a name, not by a pattern. That name is found
from the tokenizer's own description, and a tokenizer that does something else is refused.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lightning_peft.engine.loading.gguf_splits import WRITTEN
from lightning_peft.errors import UnsupportedError, itemize

# Kinds of tokens in GGUF files.
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\u2581"
_GEMMAS_SPLIT = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}


@dataclass
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        model: ``"gpt2"`` for byte-level BPE, ``"llama"`` for SentencePiece's.
        tokens: All tokens, by id; as many as the embedding has rows.
        types: GGUF's kind of each.
        special: Ids by GGUF's name of their use, such as ``"bos"``.
        adds: Whether the tokens ``"bos"`` and ``"eos"`` are put around a text.
        pre: llama.cpp's name of the splitting into words; ``None`` where there is none.
        merges: Pairs of tokens, for ``"gpt2"``.
        scores: The higher, the earlier a token is merged, for ``"llama"``.
        space_first: Whether a space is put before a text, for ``"llama"``.
    """

    model: str
    tokens: list[str]
    types: list[int]
    special: dict[str, int]
    adds: dict[str, bool]
    pre: str | None = None
    merges: list[str] | None = None
    scores: list[float] | None = None
    space_first: bool = False
    notes: list[str] = field(default_factory=list)

    def add_to(self, writer: Any) -> None:
        """Adds it to a ``gguf.GGUFWriter``."""
        writer.add_tokenizer_model(self.model)
        if self.pre is not None:
            writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        for use, token in self.special.items():
            getattr(writer, f"add_{use}_token_id")(token)
        for use, added in self.adds.items():
            getattr(writer, f"add_add_{use}_token")(added)
        writer.add_add_space_prefix(self.space_first)


def vocabulary_of(
    tokenizer: Any, rows: int, turn_end: str | None = None, prompt: str | None = None
) -> Vocabulary:
    """Returns the vocabulary of a tokenizer for an embedding of ``rows``; refuses other token ids.

    ``turn_end`` ends an answer by the chat template, and ``prompt`` is a conversation as text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedError(
            f"{type(tokenizer).__name__} has no fast tokenizer of the library tokenizers, and GGUF "
            "files are written from that. Export the model with --format merged."
        )
    described = json.loads(backend.to_str())
    model = described["model"]
    special_first = prompt is not None and prompt.startswith(
        tuple(added["content"] for added in described["added_tokens"])
    )
    reasons = [*_obstacles(described, tokenizer, rows, special_first)]
    if reasons:
        raise UnsupportedError(
            f"{type(tokenizer).__name__} is not written into a GGUF file: llama.cpp would give "
            "other tokens than in training." + itemize(reasons, 8) + "\nExport the model with "
            "--format merged."
        )
    special = _special(tokenizer, turn_end)
    tokens, types = _tokens(described, special.get("unk"), rows)
    around = tokenizer("a")["input_ids"]
    found = Vocabulary(
        model="llama" if model["byte_fallback"] else "gpt2",
        tokens=tokens,
        types=types,
        special=special,
        adds={
            "bos": around[0] == tokenizer.bos_token_id,
            "eos": len(around) > 1 and around[-1] == special["eos"],
        },
        notes=list(_notes(described)),
    )
    pairs = _pairs(model)
    if found.model == "gpt2":
        found.pre = WRITTEN[_split(described), model["ignore_merges"]]
        found.merges = [" ".join(pair) for pair in pairs]
    else:
        found.pre = "default"
        found.scores, found.space_first = _scores(tokens, pairs), _scheme(described) == "always"
    return found


def _special(tokenizer: Any, turn_end: str | None) -> dict[str, int]:
    found = {use: getattr(tokenizer, f"{use}_token_id") for use in ("bos", "eos", "unk", "pad")}
    ends = tokenizer.convert_tokens_to_ids(turn_end) if turn_end else None
    # Where a file names none, llama.cpp takes the token 11.
    found["bos"] = found["eos"] if found["bos"] is None else found["bos"]
    found["eot"] = ends if ends not in (found["eos"], found["unk"]) else None
    return {use: token for use, token in found.items() if token is not None}


def _tokens(described: dict[str, Any], unk: int | None, rows: int) -> tuple[list[str], list[int]]:
    tokens, types = [f"[PAD{index}]" for index in range(rows)], [_UNUSED] * rows
    for token, index in described["model"]["vocab"].items():
        byte = described["model"]["byte_fallback"] and re.fullmatch("<0x..>", token)
        tokens[index], types[index] = token, _BYTE if byte else _NORMAL
    for added in described["added_tokens"]:
        kind = _CONTROL if added["special"] else _USER
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    if unk is not None and types[unk] == _NORMAL:
        types[unk] = _UNKNOWN
    return tokens, types


def _pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]


def _parts(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return list(step[inner]) if step["type"] == "Sequence" else [step]


def _split(described: dict[str, Any]) -> str:
    """Returns how text is split into words, in the words of the table."""
    words = []
    for part in _parts(described["pre_tokenizer"], "pretokenizers"):
        kind = part["type"]
        if kind == "ByteLevel" and not part["add_prefix_space"]:
            words += ["words"] if part["use_regex"] else []
        elif kind == "Digits" and part["individual_digits"]:
            words.append("digits")
        elif kind == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
            words.append(str(part["pattern"].get("Regex")))
        else:
            words.append(json.dumps(part))
    return ", ".join(words)


def _scheme(described: dict[str, Any]) -> str | None:
    """Returns where SentencePiece's space is added: ``"always"``, ``"first"`` or ``"never"``."""
    if any(part["type"] == "Prepend" for part in _parts(described["normalizer"], "normalizers")):
        return "always"
    for part in _parts(described["pre_tokenizer"], "pretokenizers"):
        if part["type"] == "Metaspace":
            return str(part["prepend_scheme"])
    return None


def _notes(described: dict[str, Any]) -> Iterator[str]:
    if any(part["type"] == "NFC" for part in _parts(described["normalizer"], "normalizers")):
        yield (
            "the tokenizer puts text into Unicode's form NFC, and llama.cpp does not: text in "
            "another form gets other tokens"
        )
    metaspace = any(
        part["type"] == "Metaspace" for part in _parts(described["pre_tokenizer"], "pretokenizers")
    )
    if metaspace and _scheme(described) == "always":
        yield (
            "a text that begins with a space gets one more token in llama.cpp, which puts a space "
            "before it all the same"
        )
    elif _scheme(described) == "first":
        yield (
            "conversations get the same tokens; a text without a special token in front lacks the "
            "space in llama.cpp that the tokenizer puts before the first word"
        )
    stripping = [
        added["content"]
        for added in described["added_tokens"]
        if added["lstrip"] or added["rstrip"] or added["single_word"]
    ]
    if stripping:
        yield (
            "these tokens take spaces around them, or stand alone, and in llama.cpp do not: "
            + ", ".join(stripping[:5])
        )


def _obstacles(
    described: dict[str, Any], tokenizer: Any, rows: int, special_first: bool
) -> Iterator[str]:
    model = described["model"]
    if len(tokenizer) > rows:
        yield f"it has {len(tokenizer)} tokens, and the model's embedding {rows} rows"
    if tokenizer.eos_token_id is None:
        yield "it has no eos_token, and llama.cpp would take some token for it"
    if model["type"] != "BPE":
        yield f"its model is {model['type']}: only BPE is written"
        return
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model[key]:
            yield f"{key}={model[key]!r}"
    if model["byte_fallback"]:
        yield from _unlike_sentencepiece(described, special_first)
    else:
        yield from _unlike_bytes(described)


def _unlike_bytes(described: dict[str, Any]) -> Iterator[str]:
    others = [p for p in _parts(described["normalizer"], "normalizers") if p["type"] != "NFC"]
    if others:
        yield f"it changes text first: {json.dumps(others)}"
    found = (_split(described), described["model"]["ignore_merges"])
    if found not in WRITTEN:
        yield (
            f"it splits text into words by {found[0]!r} with ignore_merges={found[1]}; known are "
            f"those of {', '.join(WRITTEN.values())}"
        )


def _unlike_sentencepiece(described: dict[str, Any], special_first: bool) -> Iterator[str]:
    prepend = {"type": "Prepend", "prepend": _SPACE}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    normalizers = _parts(described["normalizer"], "normalizers")
    splits = _parts(described["pre_tokenizer"], "pretokenizers")
    if normalizers == [replace] and splits == [_GEMMAS_SPLIT]:
        # At spaces, of which the normalizer has left none.
        splits = []
    metaspace = [p for p in splits if p["type"] == "Metaspace" and p["replacement"] == _SPACE]
    plain = normalizers in ([prepend, replace], [replace]) and not splits
    if not plain and not (len(metaspace) == len(splits) == 1 and not normalizers):
        yield (
            "it changes and splits text by "
            f"{json.dumps([*normalizers, *splits], ensure_ascii=False)}, and llama.cpp puts "
            f"{_SPACE} for spaces only"
        )
    elif metaspace and metaspace[0]["split"]:
        yield "it splits text into words, and llama.cpp's SentencePiece does not"
    elif _scheme(described) == "first" and not special_first:
        yield (
            f"it puts {_SPACE} before the first word of a text, and llama.cpp before each part "
            "that follows a special token, or nowhere; no chat template begins with such a token"
        )
    if described["model"]["ignore_merges"]:
        yield "ignore_merges=True: llama.cpp merges pair by pair"
    yield from _unlike_scores(described)


def _unlike_scores(described: dict[str, Any]) -> Iterator[str]:
    """Yields why merging by tokens, as SentencePiece does, is not merging by pairs."""
    model, added = described["model"], {each["content"] for each in described["added_tokens"]}
    pairs, vocab = _pairs(model), model["vocab"]
    there, made = set(pairs), ["".join(pair) for pair in pairs]
    blocks = Counter(
        token for token, before in zip(made, [None, *made], strict=False) if token != before
    )
    # Runs of spaces share a score, and both merge them from the left: what is between is one too.
    split = [index for index, token in enumerate(made) if blocks[token] > 1]
    if split and any(len(set(token)) > 1 for token in made[split[0] : split[-1] + 1]):
        yield "pairs that make the same token have other merges between them"
    lacking = [
        f"{token[:cut]} {token[cut:]}"
        for token in sorted(set(vocab) - added)
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab and (token[:cut], token[cut:]) not in there
    ]
    if lacking:
        yield (
            f"{len(lacking)} pairs of tokens that make a token are not among its merges (such as "
            f"{lacking[0]!r}), and llama.cpp merges them"
        )


def _scores(tokens: list[str], pairs: list[tuple[str, str]]) -> list[float]:
    made = dict.fromkeys("".join(pair) for pair in pairs)
    rank = {token: -float(index) for index, token in enumerate(made, 1)}
    return [rank.get(token, 0.0) for token in tokens]
