"""Pre-tokenizer patterns of llama.cpp's byte-level vocabularies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Regex, pre_tokenizers

# As GPT-2 does, and with digits one by one before.
WORDS, DIGITS = "words", "digits, words"
_TEXT = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_SHORT}|{_TEXT}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_SHORT}|{_TEXT}|\p{{N}}|{_REST}"
_QWEN35 = (
    rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = f"{_CASED}{_UPPER}*{_LOWER}+|{_CASED}{_UPPER}+{_LOWER}*" + rf"|\p{{N}}|{_SYMBOLS}"
_GPT4O = (
    f"{_CASED}{_UPPER}*{_LOWER}+{_SHORT}?|{_CASED}{_UPPER}+{_LOWER}*{_SHORT}?"
    rf"|\p{{N}}{{1,3}}|{_SYMBOLS}"
)
# The split, and whether merges are skipped for words that are tokens; of names that mean the same,
# the first is the one that is written.
_NAMES: dict[tuple[str, bool], tuple[str, ...]] = {
    (WORDS, False): (
        *("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat"),
        *("mellum", "modern-bert", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "a.x-4.0"),
    ),
    (DIGITS, False): (
        *("smollm", "codeshell", "command-r", "exaone", "minerva-7b", "refact", "starcoder"),
    ),
    (_LLAMA3, True): (
        *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0"),
        *("lfm2", "jina-v5-nano"),
    ),
    (_LLAMA3, False): ("smaug-bpe", "dbrx"),
    (_QWEN2, False): (
        *("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "solar-open", "kormo", "megrez"),
        "f2llmv2",
    ),
    (_QWEN35, False): ("qwen35",),
    (_TEKKEN, True): ("tekken",),
    (_GPT4O, False): ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
}
SPLITS = {name: split for split, names in _NAMES.items() for name in names}
# What is written for a split.
WRITTEN = {split: names[0] for split, names in _NAMES.items()}


def set_split(tokenizer: Any, name: str) -> None:
    """Makes a byte-level tokenizer split text as llama.cpp does by a name of :data:`SPLITS`."""
    pattern, whole = SPLITS[name]
    steps: list[Any] = []
    if pattern == DIGITS:
        steps.append(pre_tokenizers.Digits(True))
    elif pattern != WORDS:
        steps.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(False, use_regex=pattern in (WORDS, DIGITS)))
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.model.ignore_merges = whole


def save_within(tokenizer: Any, folder: Path, rows: int) -> None:
    """Writes a tokenizer without the tokens beyond the embedding.

    transformers gives a tokenizer the special tokens of its class, which no file has a row for.
    """
    beyond = {token for token, index in tokenizer.get_added_vocab().items() if index >= rows}
    names = [name for name, token in tokenizer.special_tokens_map.items() if token in beyond]
    tokenizer.save_pretrained(folder)
    if not beyond:
        return
    file, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    written["added_tokens"] = [each for each in written["added_tokens"] if each["id"] < rows]
    file.write_text(json.dumps(written, ensure_ascii=False), encoding="utf-8")
    # A name that is left out would get the default again.
    described = json.loads(settings.read_text(encoding="utf-8")) | dict.fromkeys(names)
    settings.write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")
