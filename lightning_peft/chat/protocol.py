"""Protocol of ``chat --serve``: requests and responses as JSON lines."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TextIO

from lightning_peft.chat.sampling import NAMES, broken_rules, is_whole
from lightning_peft.errors import ConfigError, LightningPeftError, similar_names
from lightning_peft.json_equality import json_object
from lightning_peft.processes import beating

if TYPE_CHECKING:
    from lightning_peft.chat.chat_model import ChatModel

SendReply = Callable[[str], None]
ROLES = ("system", "user", "assistant", "tool")
FIELDS = (
    *("id", "adapter", "messages", "tools", "chat_template_kwargs", "rows", "adapters"),
    *(*NAMES, "seed"),
)
# Of a turn, besides its role and content.
TURN_KEYS = ("name", "tool_calls", "tool_call_id", "reasoning_content", "images")
# A program that waits for a model wants to know that it is still being loaded.
_HEARTBEAT_SECONDS = 2.0


class Server:
    """Answers the requests that come in as lines; ``system`` and ``seed`` are for those without.

    Lines are read in a thread of their own, so that an answer can be stopped while it is given.
    """

    def __init__(
        self, lines: Iterable[str], out: TextIO, system: str | None = None, seed: int = 0
    ) -> None:
        self._lines, self._out, self._system, self._seed = lines, out, system, seed
        self._lock = threading.Lock()
        self._waiting: SimpleQueue[str | None] = SimpleQueue()
        # Ids of requests that are not answered yet, and of those of them that are to stop.
        self._open: set[Any] = set()
        self._stopped: set[Any] = set()
        self._first = ""

    def serve(self, make: Callable[[SendReply], ChatModel]) -> None:
        """Loads the model by ``make``, which reports progress, and answers until the lines end."""
        threading.Thread(target=self._read, daemon=True).start()
        try:
            with self._loading() as say:
                chat_model = make(say)
                ready = self._described(chat_model)
        except LightningPeftError as error:
            self._write({"error": str(error)})
            raise
        self._first = chat_model.active
        self._write({"ready": ready})
        while (line := self._waiting.get()) is not None:
            self._take(chat_model, line)

    def _read(self) -> None:
        try:
            for line in self._lines:
                row = json_object(line)
                if row is not None and set(row) == {"stop"}:
                    self._stop(row["stop"])
                elif line.strip():
                    self._begin(row)
                    self._waiting.put(line)
        finally:
            self._waiting.put(None)

    def _begin(self, row: Mapping[str, Any] | None) -> None:
        key = _id_of(row)
        with self._lock:
            if key is not None:
                self._open.add(key)

    def _stop(self, key: Any) -> None:
        with self._lock:
            # An answer may end while the wish to stop it is on its way.
            if isinstance(key, (str, int)) and key in self._open:
                self._stopped.add(key)

    def _take(self, chat_model: ChatModel, line: str) -> None:
        row = json_object(line)
        key = _id_of(row)
        try:
            checked = _checked(row, key, chat_model.names)
            with self._prepared(chat_model, checked):
                (self._score if "rows" in checked else self._answer)(chat_model, key, checked)
        except BrokenPipeError:
            raise
        except LightningPeftError as error:
            self._write({"id": key, "error": str(error)})
        except Exception as error:
            # Such as memory that runs out: the next question may be a shorter one.
            self._write({"id": key, "error": f"{type(error).__name__}: {error}"})
        with self._lock:
            self._open.discard(key)
            self._stopped.discard(key)

    @contextmanager
    def _prepared(self, chat_model: ChatModel, row: Mapping[str, Any]) -> Iterator[None]:
        """Within the body, the model answers as a request specifies."""
        # Not who answered last: a request means the same whatever came before it.
        chat_model.switch(row.get("adapter", self._first))
        import_module("torch").manual_seed(row.get("seed", self._seed))
        before = chat_model.sampling, chat_model.tools, chat_model.variables_override
        options = {name: row[name] for name in NAMES if name in row}
        if "stop" in options:
            options["stop"] = tuple(options["stop"])
        chat_model.sampling = replace(chat_model.sampling, **options)
        inputs = import_module("lightning_peft.chat.template_inputs")
        try:
            if "tools" in row:
                given = inputs.context_of("tools", row["tools"], "The request")
                chat_model.tools = given.get("tools", [])
            name = "chat_template_kwargs"
            if name in row:
                chat_model.variables_override = inputs.context_of(name, row[name], "The request")
            yield
        finally:
            chat_model.sampling, chat_model.tools, chat_model.variables_override = before

    def _answer(self, chat_model: ChatModel, key: Any, row: Mapping[str, Any]) -> None:
        messages = row["messages"]
        if self._system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._system}, *messages]
        answer = chat_model.answer(
            _turns(chat_model, messages),
            lambda text: self._write({"id": key, "text": text}),
            lambda: key in self._stopped,
        )
        done = {"tokens": answer.tokens, "ended": answer.ended, "stopped": answer.stopped}
        self._write({"id": key, "done": True, **done, "dropped": answer.dropped})

    def _score(self, chat_model: ChatModel, key: Any, row: Mapping[str, Any]) -> None:
        comparison = import_module("lightning_peft.chat.comparison")
        prompts = []
        for one in row["rows"]:
            *earlier, question = _turns(chat_model, one["messages"])
            images = question.get("images", ())
            prompts.append(
                comparison.Prompt(question["content"], one.get("reference"), earlier, images)
            )
        names = row.get("adapters", chat_model.names)
        state = {"done": 0, "total": len(prompts) * len(names)}

        def tell() -> None:
            self._write({"id": key, "progress": state})

        def progress(_: str, done: int, total: int) -> None:
            state["done"] = done
            tell()

        def stop() -> bool:
            return key in self._stopped

        # Long prompts and answers must not look like a process that hangs.
        with beating(tell, _HEARTBEAT_SECONDS):
            found = comparison.answers(chat_model, prompts, self._system, progress, stop, names)
            for one in found:
                self._write({"id": key, "row": one})
        self._write({"id": key, "done": True, "stopped": key in self._stopped})

    def _described(self, chat_model: ChatModel) -> dict[str, Any]:
        model = chat_model.loaded.model
        return {
            "names": chat_model.names,
            "active": chat_model.active,
            "device": model.device.type,
            "template": chat_model.template().name,
            "prompt_affixes": chat_model.prompt_affixes(),
            "memory_bytes": model.get_memory_footprint(),
            "images": chat_model.images is not None,
            "notes": list(chat_model.loaded.notes),
        }

    @contextmanager
    def _loading(self) -> Iterator[SendReply]:
        begun, current = time.monotonic(), ["starting"]

        def tell() -> None:
            seconds = round(time.monotonic() - begun, 1)
            self._write({"progress": {"what": current[0], "seconds": seconds}})

        def say(what: str) -> None:
            current[0] = what
            tell()

        with beating(tell, _HEARTBEAT_SECONDS):
            yield say

    def _write(self, row: Mapping[str, Any]) -> None:
        with self._lock:
            print(json.dumps(row), file=self._out, flush=True)


def _turns(chat_model: ChatModel, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the turns of a request as a model takes them."""
    turns = list(map(import_module("lightning_peft.chat.template_inputs").turn_of, messages))
    if any(turn.get("images") for turn in turns):
        chat_model.require_images("The image of a request")
        turns = import_module("lightning_peft.chat.images").with_decoded_images(turns)
    return turns


def _id_of(row: Mapping[str, Any] | None) -> str | int | None:
    key = (row or {}).get("id")
    return key if isinstance(key, (str, int)) and not isinstance(key, bool) else None


def _checked(row: dict[str, Any] | None, key: Any, names: list[str]) -> dict[str, Any]:
    """Returns a request whose values can be used."""
    if row is None:
        raise ConfigError("The line is not a JSON object. A request is one, on a line of its own.")
    unknown = [name for name in row if name not in FIELDS]
    problems = [f"there is no field {name!r}{similar_names(name, FIELDS)}" for name in unknown]
    if key is None:
        problems.append(f"id={row.get('id')!r}: a text or a whole number, to distinguish answers")
    adapter = row.get("adapter", names[0])
    if adapter not in names:
        problems.append(f"adapter={adapter!r}: there are {', '.join(names)}")
    problems += [*_problems_of_questions(row, names), *_problems_of_numbers(row)]
    if problems:
        raise ConfigError("; ".join(problems))
    return row


def _problems_of_questions(row: dict[str, Any], names: list[str]) -> Iterator[str]:
    if "rows" not in row:
        yield from _problems_of_messages(row.get("messages"))
        if "adapters" in row:
            yield "adapters: it is for a request with `rows`; one with `messages` has `adapter`"
        return
    for key in ("messages", "adapter"):
        if key in row:
            yield f"{key}: a request with `rows` has none"
    asked = row.get("adapters", names)
    if not isinstance(asked, list) or not asked or any(name not in names for name in asked):
        yield f"adapters={asked!r}: a list of {', '.join(names)}"
    rows = row["rows"]
    if not isinstance(rows, list) or not rows:
        yield 'rows: a list of objects, each {"messages": [...], "reference": ...}'
        return
    for place, one in enumerate(rows):
        known = isinstance(one, dict) and set(one) <= {"messages", "reference"}
        if not known or not isinstance(one.get("reference", ""), str):
            yield f"rows[{place}]: an object of `messages` and perhaps the text `reference`"
            continue
        yield from (f"rows[{place}].{text}" for text in _problems_of_messages(one.get("messages")))
        messages = one.get("messages")
        if isinstance(messages, list) and messages and _role(messages[-1]) == "tool":
            yield f"rows[{place}].messages: the last turn is of 'tool', and is to be the user's"


def _role(turn: Any) -> Any:
    return turn.get("role") if isinstance(turn, dict) else None


def _problems_of_messages(messages: Any) -> Iterator[str]:
    if not isinstance(messages, list) or not messages:
        yield 'messages: a list of turns, each {"role": ..., "content": ...}'
        return
    for place, turn in enumerate(messages):
        if not isinstance(turn, dict) or not {"role", "content"} <= set(turn):
            yield f"messages[{place}]: an object of `role` and `content`"
            continue
        unknown = [key for key in turn if key not in ("role", "content", *TURN_KEYS)]
        for key in unknown:
            yield f"messages[{place}]: there is no key {key!r}{similar_names(key, TURN_KEYS)}"
        if turn["role"] not in ROLES or not isinstance(turn["content"], str):
            yield f"messages[{place}]: role is one of {', '.join(ROLES)}, and content a text"
        elif turn["role"] == "system" and place:
            yield f"messages[{place}]: a system turn comes first or not at all"
        images = turn.get("images", [])
        if turn["role"] == "user" and not str(turn["content"]).strip() and not images:
            yield f"messages[{place}]: content is empty"
        if not isinstance(images, list) or not all(isinstance(one, str) for one in images):
            yield f"messages[{place}]: images is a list of image files in base64"
        elif images and turn["role"] != "user":
            yield f"messages[{place}]: images are shown in the user's turns alone"
    last = messages[-1]
    if isinstance(last, dict) and last.get("role") in ("system", "assistant"):
        yield f"messages: the last turn is of {last['role']!r}; it is the user's that is answered"


def _problems_of_numbers(row: Mapping[str, Any]) -> Iterator[str]:
    broken = broken_rules(row)
    if "seed" in row and not (is_whole(row["seed"]) and 0 <= row["seed"] < 1 << 63):
        broken["seed"] = "a whole number from 0 to 2**63 - 1"
    yield from (f"{name}={row[name]!r}: {rule}" for name, rule in broken.items())
