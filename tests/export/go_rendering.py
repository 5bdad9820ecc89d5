"""Renders the words of Go's template language that this package writes."""

from __future__ import annotations

import re

import jinja2

EXPRESSIONS = {
    "not .System": "not system",
    "and $.System (eq $i 1)": "system and loop.index0 == 1",
    "and $.System (eq (len (slice $.Messages $i)) 1)": "system and loop.last",
    "not (or (eq $i 0) (and $.System (eq $i 1)))": "loop.index0 != 0 and not "
    "(system and loop.index0 == 1)",
}


def go(text: str, messages: list[dict[str, str]]) -> str:
    """Renders what :meth:`Turns.as_go` writes, with Go's words put into those of Jinja."""
    ends: list[str] = []
    pieces = re.split(r"\{\{ (.*?) \}\}", text)
    made = [repr(pieces[0]).join(("{{ ", " }}"))]
    for action, literal in zip(pieces[1::2], pieces[2::2], strict=True):
        words = action.removeprefix("else ").removeprefix("if ")
        condition = re.sub(r'^eq \.Role "(\w+)"$', r"m.role == '\1'", words)
        condition = EXPRESSIONS.get(words, condition)
        if action.startswith("range"):
            made.append("{% for m in messages %}")
            ends.append("{% endfor %}")
        elif action.startswith("if"):
            made.append(f"{{% if {condition} %}}")
            ends.append("{% endif %}")
        elif action.startswith("else if"):
            made.append(f"{{% elif {condition} %}}")
        elif action == "end":
            made.append(ends.pop())
        else:
            plain = {".Content": "m.content", "$.System": "system"}.get(action, action)
            made.append(f"{{{{ {plain} }}}}")
        made.append(f"{{{{ {literal!r} }}}}")
    assert not ends
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    return environment.from_string("".join(made)).render(messages=messages, system=system)
