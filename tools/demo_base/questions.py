"""Question/answer pairs made from standard library docstrings.

Three forms: what a name does or is (answered with the first sentence of its docstring), what
arguments it takes, and which module provides it. Every choice that looks random is made from a
SHA-256 of the name concerned, so it is the same on every machine.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from tools.demo_base.stdlib import Entry

VALIDATION_PAIRS = 200
"""Number of question/answer pairs kept out of tuning."""

HELD_OUT_PERCENT = 2
"""Share of the documented names whose text is kept out of pre-training, in percent."""

MAX_ANSWER_WORDS = 40
MAX_PAIRS_PER_PACKAGE = 170


@dataclass(frozen=True)
class Pair:
    """A question with its answer."""

    prompt: str
    response: str
    # The name that it is about. Never split between train and validation, so that one question
    # about a name does not give away another.
    subject: str
    # `summary`, `arguments` or `module`.
    form: str


def stable_number(text: str) -> int:
    """Returns a number drawn from ``text`` that is the same on every machine and Python."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


def is_held_out(name: str) -> bool:
    """Whether the documents about ``name`` are kept out of the pre-training text.

    Decided from the name alone: the set does not move when another Python version adds or drops
    a function.
    """
    return stable_number(f"pretraining:{name}") % 100 < HELD_OUT_PERCENT


_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|etc|vs|cf|resp|approx|Dr|Mr|St)|\b[A-Z])\.$")
_SENTENCE_END = re.compile(r"[.!?][\"')`]*\s+(?=[\"'`(]?[A-Z])")


def sentences(paragraph: str) -> list[str]:
    """Splits one paragraph into sentences, leaving abbreviations such as ``e.g.`` whole."""
    text = " ".join(paragraph.split())
    found: list[str] = []
    start = 0
    for match in _SENTENCE_END.finditer(text):
        sentence = text[start : match.end()].strip()
        if _ABBREVIATION.search(sentence):
            continue
        found.append(sentence)
        start = match.end()
    rest = text[start:].strip()
    return [*found, rest] if rest else found


_FIRST_WORD = re.compile(r"[A-Z][a-z]+(?:-[A-Za-z]+)?$|A$|An$|I/O$|[A-Z]{2,6}$")
_NOISE = re.compile(
    r"[|<>{}\\_^#$%=+@~\[\]]{2,}|>>>|\.\.\.|->|--|::|XXX|TODO|FIXME|https?:|\?|\bI\b"
    r"|\b(?:self|for now|hack|kludge|monkeypatch\w*|sigh|ugly)\b|[^\x20-\x7e]"
    r"|\bv?\d+\.\d+\b.*\b(?:added|removed|deprecated)\b|\b(?:RFC|PEP) ?\d"
)
_VAGUE = re.compile(
    r"(?:See|Same|Like|Similar|Identical|Equivalent|Alias|Deprecated|Obsolete|Internal|Private|"
    r"Undocumented|Helper|Note|Default|This|These|That|It|If|Don|Do|Also|Override|Overrid\w+|"
    r"Hook|Synonym|Not|Please|Usage|Example|Examples|Old|Hack|Wow|Implements|Implement|Mixin|"
    r"Callback|Constructor|Init|Initialize|Initializes|Used|There|Because|For|When|So|Optional|"
    r"Optionally|Ditto|Wrapper|Simple|Version|Copyright|Author|Here|Test|Tests|Wrap)\b"
)


def is_good_sentence(sentence: str) -> bool:
    """Whether ``sentence`` reads as one complete English sentence that stands by itself."""
    words = sentence.split()
    if not 4 <= len(words) <= MAX_ANSWER_WORDS or not sentence.endswith("."):
        return False
    if not _FIRST_WORD.match(words[0].rstrip(",")) or _NOISE.search(sentence):
        return False
    if any(sentence.count(left) != sentence.count(right) for left, right in ("()", "[]")):
        return False
    if sentence.count("`") % 2 or sentence.count('"') % 2 or sentence.count("*"):
        return False
    letters = sum(character.isalpha() or character == " " for character in sentence)
    return letters >= 0.85 * len(sentence)


def summary(entry: Entry) -> str | None:
    """Returns the first sentence or two of a docstring as an answer, or None if it is unsuitable.

    A second sentence is added where the first is short and both together stay within
    ``MAX_ANSWER_WORDS``.
    """
    paragraph = entry.doc.split("\n\n", 1)[0]
    if "\n " in paragraph:
        return None
    if entry.kind == "module":
        # Module docstrings often open with a title line and continue with the sentence.
        paragraph = re.sub(r"^[\w.]+ ?(?:--|-|:) ", "", paragraph)
    found = sentences(paragraph)
    if not found:
        return None
    first = found[0]
    if len(found) == 1 and first[-1].isalnum():
        first += "."
    if not is_good_sentence(first) or _VAGUE.match(first):
        return None
    if len(found) > 1 and len(first.split()) < 9 and is_good_sentence(found[1]):
        both = f"{first} {found[1]}"
        if len(both.split()) <= MAX_ANSWER_WORDS and not re.match(r"(?:See|Note)\b", found[1]):
            return both
    return first


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


_PLAIN_DEFAULT = re.compile(r"None|True|False|-?\d+(?:\.\d+)?|'[ -~]{0,12}'|\(\)")
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


def _arguments_answer(entry: Entry) -> str | None:
    """Returns a sentence that lists the parameters, where there are one to six plain ones."""
    if not entry.parameters or len(entry.parameters) > 6:
        return None
    shown = []
    for name, default in entry.parameters:
        if name.startswith("_") or (default and not _PLAIN_DEFAULT.fullmatch(default)):
            return None
        shown.append(f"`{name}`" if default is None else f"`{name}` (default {default})")
    plural = "" if len(shown) == 1 else "s"
    return f"`{entry.name}` takes {_NUMBERS[len(shown)]} argument{plural}: {_listed(shown)}."


def _share(items: Iterable[Pair], percent: int) -> Iterator[Pair]:
    return (pair for pair in items if stable_number(f"share:{pair.prompt}") % 100 < percent)


def _summary_question(entry: Entry) -> str:
    if entry.kind == "module":
        return f"What is the `{entry.name}` module for?"
    if entry.kind in ("class", "property", "special form"):
        return f"What is `{entry.name}`?"
    return f"What does `{entry.name}` do?"


def _module_pair(entry: Entry) -> Pair:
    subject = f"the {entry.kind} `{entry.path}`"
    answer = f"T{subject[1:]} is provided by the `{entry.module}` module."
    return Pair(f"Which module provides {subject}?", answer, entry.name, "module")


def _capped(pairs: Iterable[Pair]) -> set[str]:
    """Returns the prompts to keep so that a few large packages do not make up most of them."""
    per_package: dict[str, list[str]] = {}
    for pair in pairs:
        per_package.setdefault(pair.subject.partition(".")[0], []).append(pair.prompt)
    kept: set[str] = set()
    for prompts in per_package.values():
        prompts.sort(key=lambda prompt: stable_number(f"cap:{prompt}"))
        kept.update(prompts[:MAX_PAIRS_PER_PACKAGE])
    return kept


def build_pairs(entries: Sequence[Entry]) -> list[Pair]:
    """Makes question/answer pairs with unique questions, in the order of the entries.

    Left out are names kept out of pre-training (the point of the demo is a base that has read the
    text), names that are not public, and every sentence that answers more than one question, since
    it would stand in train and validation at once.
    """
    answers = Counter(summary(entry) for entry in entries)
    definitions = [entry for entry in entries if entry.kind in ("class", "function")]
    homes = Counter(entry.path for entry in definitions)
    usable = [entry for entry in entries if entry.public and not is_held_out(entry.name)]

    asked: list[Pair] = []
    arguments: list[Pair] = []
    modules: list[Pair] = []
    for entry in usable:
        answer = summary(entry)
        if answer is not None and answers[answer] == 1:
            asked.append(Pair(_summary_question(entry), answer, entry.name, "summary"))
        listed = _arguments_answer(entry)
        if listed is not None:
            question = f"What arguments does `{entry.name}` take?"
            arguments.append(Pair(question, listed, entry.name, "arguments"))
        top_level = entry.kind in ("class", "function") and "." not in entry.path
        if top_level and len(entry.path) > 3 and homes[entry.path] == 1:
            modules.append(_module_pair(entry))
    chosen = [*asked, *_share(arguments, 20), *_share(modules, 30)]
    order = {entry.name: position for position, entry in enumerate(usable)}
    chosen.sort(key=lambda pair: (order[pair.subject], pair.form))
    kept = _capped(chosen)
    return [pair for pair in chosen if pair.prompt in kept]


def split_pairs(
    pairs: Sequence[Pair], validation: int = VALIDATION_PAIRS
) -> tuple[list[Pair], list[Pair]]:
    """Splits pairs into train and validation by the name they ask about.

    The validation part exceeds its number only as far as the last name has more than one question.
    """
    if len(pairs) <= validation:
        raise ValueError(
            f"Cannot keep {validation} of {len(pairs)} question/answer pairs for validation: none "
            "would be left to train on. Ask for fewer validation pairs, or check that the "
            "interpreter's standard library comes with its docstrings."
        )
    subjects: dict[str, list[Pair]] = {}
    for pair in pairs:
        subjects.setdefault(pair.subject, []).append(pair)
    chosen: set[str] = set()
    count = 0
    for subject in sorted(subjects, key=lambda name: stable_number(f"split:{name}")):
        if count >= validation:
            break
        chosen.add(subject)
        count += len(subjects[subject])
    train = [pair for pair in pairs if pair.subject not in chosen]
    return train, [pair for pair in pairs if pair.subject in chosen]
