"""Calling handlers of a real server as anyone can who knows its address: by plain HTTP."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any
from urllib.parse import urlencode

import httpx

from tests.app.servers import Server

# Generous: on a busy machine everything takes longer, and only a failure waits to the end.
LONGEST_SECONDS = 60.0
# Some wait for commands in another process, while others keep the server busy.
AT_ONCE = 3


@dataclass(frozen=True)
class Handler:
    """A function that a page has bound to events.

    Attributes:
        number: By which it is called.
        name: Of the function.
        queued: Whether it is called through the queue; there is no other way to those.
        inputs: How many values it is sent.
        given: How many of them are the visitor's; of the others the server has its own.
        event: Whether it receives the event data.
        page: The page that it is on.
    """

    number: int
    name: str
    queued: bool
    inputs: int
    given: int
    event: bool
    page: str

    @classmethod
    def listed(cls, one: dict[str, Any], name: str = "", given: int = 0, page: str = "") -> Handler:
        """Returns a handler as ``/config`` lists it."""
        queued, event = one["queue"] is not False, bool(one["collects_event_data"])
        return cls(one["id"], name, queued, len(one["inputs"]), given, event, page)


@dataclass(frozen=True)
class Call:
    """What is sent to a handler.

    Attributes:
        data: A value for each of its inputs.
        event: What was clicked.
        query: What stands in the address of the page.
    """

    data: list[Any]
    event: dict[str, Any] | None = None
    query: dict[str, str] = field(default_factory=dict)


def handlers_of(server: Server, client: httpx.Client) -> list[list[Handler]]:
    """Returns every function that can be called, in one language, those of one name together.

    A page binds some of them to a hundred events, and lists each; ``serve.py`` tells which are one.
    """
    listed = {one["id"]: one for one in client.get("/config").json()["dependencies"]}
    report = json.loads((server.folder / "handlers.json").read_text())
    own = {number for number, one in listed.items() if one["backend_fn"]}
    assert own == {row["number"] for row in report}
    found: dict[int, Handler] = {}
    for row in report:
        if row["page"].partition("-")[0] != "de":
            more = (row["name"], row["given"], row["page"])
            one = Handler.listed(listed[row["number"]], *more)
            found.setdefault(row["function"], one)
    ordered = sorted(found.values(), key=lambda one: (one.name, one.number))
    return [list(ones) for _, ones in groupby(ordered, key=lambda one: one.name)]


def attack(
    client: httpx.Client,
    groups: Sequence[Sequence[Handler]],
    calls: Callable[[Handler, int], Sequence[Call]],
    check: Callable[[Handler, str], None],
) -> None:
    """Calls handlers, each group from a page of its own: what one leaves there meets the next.

    Args:
        client: Who calls.
        groups: What :func:`handlers_of` returns.
        calls: The next arguments of a handler, by its place in its group.
        check: Takes a handler and all that came back.
    """

    load = "bind_page_load.<locals>.load"
    opening = [one for group in groups for one in group if one.name == load]

    def group_called(group: Sequence[Handler]) -> None:
        session, pages = uuid.uuid4().hex, {one.page for one in group}
        for one in opening:
            if one.page in pages:
                called(client, one, [Call([None] * one.inputs)], session)
        for number, one in enumerate(group):
            check(one, called(client, one, calls(one, number), session))

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(group_called, groups))


def call(client: httpx.Client, one: dict[str, Any], data: list[Any]) -> str:
    """Calls a handler that ``/config`` lists, as a new page, and returns all that comes back."""
    return called(client, Handler.listed(one), [Call(data)], uuid.uuid4().hex)


def called(client: httpx.Client, one: Handler, calls: Sequence[Call], session: str) -> str:
    """Calls a handler as its page would, but with anything, and returns all that comes back.

    Args:
        client: Who calls.
        one: The handler.
        calls: What is sent to it, one after the other.
        session: The page that calls, as the server knows it.

    Raises:
        AssertionError: If one of the calls is never answered.
    """
    place = "queue/join" if one.queued else "run/predict"
    text, waiting = "", set()
    for sent in calls:
        body = {"data": sent.data, "fn_index": one.number, "session_hash": session}
        if sent.event is not None:
            body["event_data"] = sent.event
        page = {"Referer": f"{client.base_url}/run?{urlencode(sent.query)}"}
        url = f"/gradio_api/{place}"
        answer = client.post(url, json=body, params=sent.query, headers=page)
        text += answer.text + "\n"
        if one.queued and answer.status_code == 200:
            waiting.add(answer.json()["event_id"])
    if waiting:
        text += _heard(client, session, waiting)
    assert not waiting, f"{one} does not answer: {text[-2000:]}"
    return text


def _heard(client: httpx.Client, session: str, waiting: set[str]) -> str:
    """Returns the messages until the server has no more; finished clients are removed."""
    text, end = "", time.monotonic() + LONGEST_SECONDS
    url = f"/gradio_api/queue/data?session_hash={session}"
    with client.stream("GET", url) as stream:
        for line in stream.iter_lines():
            text += line + "\n"
            if line.startswith("data:"):
                message = json.loads(line.removeprefix("data:"))
                if message["msg"] == "process_completed":
                    waiting.discard(message["event_id"])
            if time.monotonic() > end:
                break
    return text
