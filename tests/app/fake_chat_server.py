"""A ``chat --serve`` without a model: it says who is asked what, or does what a question tells it.

``fake.json`` in the first adapter's folder says how it loads: ``{"loading": "error" | "die" |
"hang"}``.

The questions ``die``, ``hang``, ``fail`` and ``long`` do what they say. Rows to score are
answered with their own questions; one that is called ``wait`` waits until it is stopped.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from pathlib import Path


def say(**row: object) -> None:
    print(json.dumps(row), flush=True)


def main(words: list[str]) -> None:
    adapters = dict(word.split("=", 1) for word in words if "=" in word)
    first = Path(next(iter(adapters.values())))
    (first / "started.json").write_text(
        json.dumps({"pid": os.getpid(), "words": words, "environment": dict(os.environ)})
    )
    known = first / "fake.json"
    how = json.loads(known.read_text())["loading"] if known.exists() else ""
    say(progress={"what": "loading the model", "seconds": 0.5})
    if how == "error":
        say(error=f"the base in {first} is another one, hf_abcdefghijklmnop")
        sys.exit(1)
    if how == "die":
        print("no memory is left", file=sys.stderr)
        os._exit(9)
    if how == "hang":
        time.sleep(60)
    names = ["base", *adapters]
    around = ["### User:\n", "\n\n### Assistant:\n"]
    say(ready={"names": names, "device": "cpu", "notes": ["a note"], "prompt_affixes": around})
    rows: queue.SimpleQueue[dict] = queue.SimpleQueue()
    stopped: set[int] = set()

    def read() -> None:
        for line in sys.stdin:
            row = json.loads(line)
            if set(row) == {"stop"}:
                stopped.add(row["stop"])
            else:
                rows.put(row)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        answer(rows.get(), stopped)


def score(row: dict, stopped: set[int]) -> None:
    key, names = row["id"], row["adapters"]
    for number, one in enumerate(row["rows"]):
        question, wanted = one["messages"][-1]["content"], one["reference"]
        while question == "wait" and key not in stopped:
            time.sleep(0.005)
        if key in stopped:
            break
        say(id=key, progress={"done": len(names) * (number + 1), "total": 0})
        found = {"exact": question == wanted, "valid_json": None, "token_overlap": 0.5}
        answers, scores = dict.fromkeys(names, question), dict.fromkeys(names, found)
        known = {"prompt": question, "reference": wanted, "cut": []}
        say(id=key, row={**known, "answers": answers, "scores": scores})
    say(id=key, done=True, stopped=key in stopped)


def answer(row: dict, stopped: set[int]) -> None:
    if "rows" in row:
        score(row, stopped)
        return
    key, question = row["id"], row["messages"][-1]["content"]
    shown = [f" {image}" for turn in row["messages"] for image in turn.get("images", ())]
    if question == "die":
        os._exit(9)
    if question == "hang":
        time.sleep(60)
    if question == "fail":
        say(id=key, error="CUDA out of memory")
        return
    pieces = (
        ["word "] * 2_000 if question == "long" else [row["adapter"], " heard ", question, *shown]
    )
    for number, piece in enumerate(pieces):
        if key in stopped:
            say(id=key, done=True, tokens=number, ended=False, stopped=True, dropped=0)
            return
        say(id=key, text=piece)
        time.sleep(0.005)
    say(id=key, done=True, tokens=len(pieces), ended=True, stopped=False, dropped=0)


if __name__ == "__main__":
    main(sys.argv[1:])
