"""Parsing of rows with conversations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from lightning_peft.data.json_text import json_type
from lightning_peft.data.row_keys import is_turn
from lightning_peft.data.samples import (
    DESIRABLE,
    UNDESIRABLE,
    Message,
    RowProblems,
    Sample,
    collect,
    required_texts,
    row_problem,
    shortened,
)
from lightning_peft.data.template_context import is_empty, json_value, read_context
from lightning_peft.data.turns import (
    REASONING_KEYS,
    ROLES,
    merge_reasoning,
    read_turn,
    unclosed_reasoning,
)


def _system(fields: Mapping[str, Any]) -> list[Message]:
    if fields.get("system") in (None, ""):
        return []
    return [{"role": "system", "content": required_texts(fields, ["system"])[0]}]


def _messages(turns: Any, name: str, unused: list[str]) -> list[Message]:
    """Returns turns; keys in them that nothing reads are added to ``unused``."""
    # Tables hold them as JSON text.
    turns = json_value(turns)
    if not isinstance(turns, list) or not turns:
        what = "no" if turns is None else "an empty" if turns == [] else "no list in"
        raise row_problem("missing", f"has {what} {name}")
    read = (
        partial(read_turn, turn, f"turn {n} of {name}") for n, turn in enumerate(turns, start=1)
    )
    found = collect(*read)
    unused += [f"{name}[].{key}" for _, ignored in found for key in ignored]
    return _joined_channels([message for message, _ in found])


def _joined_channels(turns: list[Message]) -> list[Message]:
    """Returns turns in which thoughts, a turn of their own in gpt-oss, are part of their answer."""
    joined: list[Message] = []
    for turn in turns:
        before = joined[-1] if joined else {}
        answers = turn["role"] == before.get("role") == "assistant"
        alone = not before.get("tool_calls") and REASONING_KEYS[0] not in turn
        if answers and alone and before.get("channel") == "analysis":
            joined[-1] = {**turn, REASONING_KEYS[0]: before["content"]}
        else:
            joined.append(turn)
    return joined


def order_problems(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Returns the problems of the order of roles in a conversation."""
    problems = []
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        problems.append(("roles", f"has a system turn at place {roles.index('system', 1) + 1}"))
    spoken = [role for role in roles if role != "system"]
    if spoken[:1] not in ([], ["user"]):
        problems.append(("roles", f"begins with {spoken[0]}, not with user"))
    for before, after in zip(spoken, spoken[1:], strict=False):
        if before == after != "tool":
            problems.append(("roles", f"has two {after} turns in a row"))
        if after == "tool" and before == "user":
            problems.append(("roles", "has a tool turn that no assistant turn asked for"))
    if roles[-1:] != ["assistant"]:
        end = roles[-1] if roles else "nothing"
        problems.append(("roles", f"ends with {end}: no assistant turn to learn at the end"))
    return list(dict.fromkeys(problems))


def _conversation(messages: list[Message]) -> list[Message]:
    problems = order_problems(messages)
    for place, message in enumerate(messages, start=1):
        if unclosed_reasoning(message):
            problems.append(("thoughts", f"has thoughts in turn {place} that do not end"))
    if problems:
        raise RowProblems(problems)
    return messages


def parse_messages(fields: Mapping[str, Any]) -> Sample:
    """Returns the turns of a row in ChatML or ShareGPT."""
    unused: list[str] = []
    turns, system, context = collect(
        lambda: _messages(fields.get("messages"), "messages", unused),
        lambda: _system(fields),
        lambda: read_context(fields),
    )
    if system and turns[0]["role"] == "system":
        if turns[0]["content"].strip() != system[0]["content"].strip():
            raise row_problem(
                "roles", "has one text as system and another in the system turn of its messages"
            )
        system = []
    return _sample(_conversation(system + turns), context, unused)


def _sample(
    messages: list[Message],
    context: dict[str, Any],
    unused: list[str],
    rejected: list[Message] | None = None,
) -> Sample:
    return Sample(messages, rejected or [], context=context, unused=tuple(dict.fromkeys(unused)))


def listed_turns(value: Any) -> list[Any] | None:
    """Returns the turns of a list, of one turn, or of JSON of either; ``None`` for all else."""
    found = json_value(value)
    if is_turn(found):
        return [found]
    if isinstance(found, list) and (found is value or (found and all(map(is_turn, found)))):
        return found
    return None


def _turns(value: Any, role: str, name: str, unused: list[str]) -> list[Message]:
    found = listed_turns(value)
    if found is not None:
        return _messages(found, name, unused)
    return [{"role": role, "content": required_texts({name: value}, [name])[0]}]


def _history(value: Any) -> list[Message]:
    """Returns earlier questions and answers, as Alpaca data has them."""
    found = json_value(value)
    if is_empty(found):
        return []
    pairs = isinstance(found, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(one, str) for one in pair)
        for pair in found
    )
    if not pairs:
        raise row_problem(
            "missing",
            f"has {shortened(value)} as history, not a list of questions with their answers",
        )
    roles = ("user", "assistant")
    return [
        {"role": r, "content": text} for pair in found for r, text in zip(roles, pair, strict=True)
    ]


def _with_reasoning(answer: list[Message], value: Any) -> list[Message]:
    """Returns an answer with the thoughts of a column of their own."""
    if is_empty(value):
        return answer
    if not isinstance(value, str):
        raise row_problem("thoughts", f"has {shortened(value)} as reasoning, not text")
    last = answer[-1]
    settled = merge_reasoning({**last, REASONING_KEYS[0]: value})
    if last.get(REASONING_KEYS[0], value) != value or settled is None:
        raise row_problem("thoughts", "has other thoughts in its answer than in reasoning")
    return [*answer[:-1], settled]


def _answered(
    fields: Mapping[str, Any],
    prompt: Callable[[], list[Message]],
    completion: Callable[[], list[Message]],
    unused: list[str],
) -> Sample:
    system, history, asked, answer, context = collect(
        lambda: _system(fields),
        lambda: _history(fields.get("history")),
        prompt,
        completion,
        lambda: read_context(fields),
    )
    answer = _with_reasoning(answer, fields.get("reasoning"))
    return _sample(_conversation([*system, *history, *asked, *answer]), context, unused)


def parse_pair(fields: Mapping[str, Any]) -> Sample:
    """Returns a prompt and its completion as turns."""
    unused: list[str] = []
    return _answered(
        fields,
        lambda: _turns(fields.get("prompt"), "user", "prompt", unused),
        lambda: _turns(fields.get("completion"), "assistant", "completion", unused),
        unused,
    )


def parse_prompt(fields: Mapping[str, Any]) -> Sample:
    """Returns the turns of a prompt, the last of which is to be answered."""
    unused: list[str] = []
    system, asked, context = collect(
        lambda: _system(fields),
        lambda: _turns(fields.get("prompt"), "user", "prompt", unused),
        lambda: read_context(fields),
    )
    turns = [*system, *asked]
    if turns[-1]["role"] == "assistant":
        raise row_problem("missing", "has a prompt that ends with an answer")
    value = json_value(fields.get("prompt"))
    prompt = value if isinstance(value, list) else fields.get("prompt")
    return Sample(turns, context=context, prompt=prompt, unused=tuple(dict.fromkeys(unused)))


def parse_unpaired(fields: Mapping[str, Any]) -> Sample:
    """Returns a prompt and its completion as turns, and whether it is desirable."""
    sample, label = collect(lambda: parse_pair(fields), lambda: _desirable(fields.get("label")))
    return replace(sample, label=label)


def _desirable(value: Any) -> str:
    """Returns the label of an answer; tables hold it as text or as a number."""
    text = str(value).strip().lower()
    if text in ("true", "1", "1.0"):
        return DESIRABLE
    if text in ("false", "0", "0.0"):
        return UNDESIRABLE
    what = "no label" if value in (None, "") else f"{shortened(value)} as label"
    raise row_problem("desirability", f"has {what}, which is true or false")


def parse_alpaca(fields: Mapping[str, Any]) -> Sample:
    """Returns an instruction, with its input below it, and the output as turns."""
    inputs = fields.get("input")

    def prompt() -> list[Message]:
        if inputs is not None and not isinstance(inputs, str):
            raise row_problem("missing", f"has {json_type(inputs)} as input, not text")
        (text,) = required_texts(fields, ["instruction"])
        text = f"{text}\n\n{inputs}" if inputs and inputs.strip() else text
        return [{"role": "user", "content": text}]

    def answer() -> list[Message]:
        return [{"role": "assistant", "content": required_texts(fields, ["output"])[0]}]

    return _answered(fields, prompt, answer, [])


def parse_preference(fields: Mapping[str, Any]) -> Sample:
    """Returns the turns with the chosen and with the rejected answer."""
    unused: list[str] = []
    fields = _with_input(fields, unused)
    # Without a prompt of their own, the answers belong to the conversation next to them.
    prompt_value = fields.get("prompt") or fields.get("messages")
    system, prompt, chosen, rejected, context = collect(
        lambda: _system(fields),
        lambda: _turns(prompt_value, "user", "prompt", unused) if prompt_value else [],
        lambda: _turns(fields.get("chosen"), "assistant", "chosen", unused),
        lambda: _turns(fields.get("rejected"), "assistant", "rejected", unused),
        lambda: read_context(fields),
    )
    if chosen[0]["role"] in ("system", "user"):
        # The answers hold the prompt as well, as in UltraFeedback.
        if fields.get("prompt"):
            _check_prompt_in_answer(prompt, chosen)
        prompt = []
    if chosen == rejected:
        raise row_problem("preference", "has the same text as chosen and rejected")
    if not prompt and chosen[:-1] != rejected[:-1]:
        raise row_problem("preference", "has different turns before the last in the two answers")
    if not prompt and len(chosen) == 1:
        # Whole texts without turns: the end of the prompt is unknown.
        return _sample([*system, *chosen], context, unused, [*system, *rejected])
    head = [*system, *prompt]
    both = [_conversation([*head, *chosen]), _conversation([*head, *rejected])]
    return _sample(both[0], context, unused, both[1])


def _with_input(fields: Mapping[str, Any], unused: list[str]) -> Mapping[str, Any]:
    """Returns fields with ``instruction`` and ``input`` as the prompt.

    OpenAI's input is an object with messages and tools, Alpaca's a text below an instruction.
    """
    inputs = {name: json_value(fields.get(name)) for name in ("instruction", "input")}
    inputs = {name: value for name, value in inputs.items() if not is_empty(value)}
    inner = inputs.get("input")
    if isinstance(inner, dict) and "messages" in inner:
        found = {name: inner[name] for name in ("messages", "tools") if name in inner}
        twice = [name for name in found if not is_empty(fields.get(name))]
        if twice or not is_empty(fields.get("prompt")) or "instruction" in inputs:
            raise row_problem("missing", "has a prompt or tools in its input and outside of it")
        unused += [f"input.{key}" for key in inner if key not in found]
        return {**fields, **found}
    if _contains_prompt(fields.get("chosen")) or fields.get("prompt") or fields.get("messages"):
        unused += inputs
        return fields
    if len(inputs) == 1:
        return {**fields, "prompt": next(iter(inputs.values()))}
    not_text = [name for name, value in inputs.items() if not isinstance(value, str)]
    if not_text:
        raise row_problem(
            "missing", f"has {shortened(inputs[not_text[0]])} as {not_text[0]}, not text"
        )
    return {**fields, "prompt": "\n\n".join(inputs.values())} if inputs else fields


def _contains_prompt(answer: Any) -> bool:
    """Returns whether an answer begins with the prompt."""
    found = json_value(answer)
    first = found[0] if isinstance(found, list) and found else None
    if not isinstance(first, Mapping):
        return False
    return ROLES.get(first.get("role", first.get("from"))) in ("system", "user")


def _check_prompt_in_answer(prompt: list[Message], answer: list[Message]) -> None:
    contents = [turn["content"].strip() for turn in answer[:-1]]
    if prompt[-1]["content"].strip() not in contents:
        shown = shortened(prompt[-1]["content"])
        raise row_problem(
            "preference", f"has the prompt {shown}, and answers that begin with other turns"
        )


def parse_source(fields: Mapping[str, Any]) -> Sample:
    """Returns a source as the user's turn, and its target as the answer."""
    source, target = required_texts(fields, ["source", "target"])
    return Sample(
        [{"role": "user", "content": source}, {"role": "assistant", "content": target}],
    )
