"""Rows that are conversations: turns, read from the fields that they come in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_peft.data.samples import (
    Message,
    RowProblems,
    Sample,
    all_of,
    shortened,
    texts,
)

_ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "developer": "system", "observation": "tool"},
}


def _system(fields: Mapping[str, Any]) -> list[Message]:
    if fields.get("system") in (None, ""):
        return []
    return [{"role": "system", "content": texts(fields, ["system"])[0]}]


def _messages(turns: Any, name: str = "messages") -> list[Message]:
    if not isinstance(turns, list) or not turns:
        what = "no" if turns is None else "an empty" if turns == [] else "no list in"
        raise RowProblems([("missing", f"has {what} {name}")])
    found, problems = [], []
    for place, turn in enumerate(turns, start=1):
        try:
            found.append(_message(turn, f"turn {place} of {name}"))
        except RowProblems as error:
            problems += error.problems
    if problems:
        raise RowProblems(problems)
    return found


def _message(turn: Any, place: str) -> Message:
    if not isinstance(turn, dict):
        raise RowProblems([("missing", f"{place} is {shortened(turn)}, not an object")])
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in _ROLES:
        known = ", ".join(_ROLES)
        raise RowProblems([("roles", f"{place} has the role {shortened(role)}; roles are {known}")])
    calls = turn.get("tool_calls")
    if isinstance(content, list):
        content = _joined(content, place)
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise RowProblems([("missing", f"{place} ({role}) has no text as content")])
    if not content.strip() and not calls:
        raise RowProblems([("missing", f"{place} ({role}) is empty")])
    extra = {key: turn[key] for key in ("tool_calls", "name", "tool_call_id") if turn.get(key)}
    return {"role": _ROLES[role], "content": content, **extra}


def _joined(parts: list[Any], place: str) -> str:
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
        raise RowProblems(
            [("missing", f"{place} holds parts that are not text: {shortened(parts)}")]
        )
    return "".join(part["text"] for part in parts)


def order_problems(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Returns what is wrong with the order of roles in a conversation."""
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
    if problems:
        raise RowProblems(problems)
    return messages


def parse_messages(fields: Mapping[str, Any]) -> Sample:
    """Returns the turns of a row in ChatML or ShareGPT."""
    turns = _messages(fields.get("messages"))
    head = _system(fields) if turns[0]["role"] != "system" else []
    return Sample(_conversation(head + turns))


def _turns(value: Any, role: str, name: str) -> list[Message]:
    if isinstance(value, list):
        return _messages(value, name)
    return [{"role": role, "content": texts({name: value}, [name])[0]}]


def parse_pair(fields: Mapping[str, Any]) -> Sample:
    """Returns a prompt and its completion as turns."""
    system, prompt, completion = all_of(
        lambda: _system(fields),
        lambda: _turns(fields.get("prompt"), "user", "prompt"),
        lambda: _turns(fields.get("completion"), "assistant", "completion"),
    )
    return Sample(_conversation(system + prompt + completion))


def parse_alpaca(fields: Mapping[str, Any]) -> Sample:
    """Returns an instruction, with its input below it, and the output as turns."""
    given = fields.get("input")
    if given is not None and not isinstance(given, str):
        raise RowProblems([("missing", f"has a {type(given).__name__} as input, not text")])
    system, (instruction,), (output,) = all_of(
        lambda: _system(fields),
        lambda: _turns(fields.get("instruction"), "user", "instruction"),
        lambda: _turns(fields.get("output"), "assistant", "output"),
    )
    if given and given.strip():
        instruction = {"role": "user", "content": f"{instruction['content']}\n\n{given}"}
    return Sample([*system, instruction, output])


def parse_preference(fields: Mapping[str, Any]) -> Sample:
    """Returns the turns with the chosen and with the rejected answer."""
    system, prompt, chosen, rejected = all_of(
        lambda: _system(fields),
        lambda: _turns(fields["prompt"], "user", "prompt") if fields.get("prompt") else [],
        lambda: _turns(fields.get("chosen"), "assistant", "chosen"),
        lambda: _turns(fields.get("rejected"), "assistant", "rejected"),
    )
    if chosen[0]["role"] in ("system", "user"):
        # The answers hold the prompt as well, as in UltraFeedback.
        prompt = []
    if chosen == rejected:
        raise RowProblems([("preference", "has the same text as chosen and rejected")])
    if not prompt and chosen[:-1] != rejected[:-1]:
        raise RowProblems(
            [("preference", "has different turns before the last in the two answers")]
        )
    if not prompt and len(chosen) == 1:
        # Whole texts without turns: nothing says where the prompt ends.
        return Sample([*system, *chosen], [*system, *rejected])
    head = [*system, *prompt]
    return Sample(_conversation([*head, *chosen]), _conversation([*head, *rejected]))


def parse_source(fields: Mapping[str, Any]) -> Sample:
    """Returns a source as the user's turn, and its target as the answer."""
    source, target = texts(fields, ["source", "target"])
    return Sample(
        [{"role": "user", "content": source}, {"role": "assistant", "content": target}],
    )
