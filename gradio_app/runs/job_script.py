"""Script of a hub job: runs the command line and writes its record to the log.

It is sent as text to a machine that has ``lightning-peft`` and nothing of this package, so it
imports neither. Whoever can read the log can rebuild the folder of the run from it: every line of
a ``.jsonl`` file and every state of a ``.json`` file is printed behind a mark.

Environment: ``RECIPE`` (YAML), ``PUSH_TO`` (``namespace/name``), ``HF_TOKEN``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

LINE_PREFIX = "@run-file "
JSONL_FILES = ("metrics.jsonl", "load.jsonl", "events.jsonl", "samples.jsonl")
JSON_FILES = ("status.json", "provenance.json", "result.json", "error.json")
INTERVAL_SECONDS = 2.0
COMMAND = [sys.executable, "-m", "lightning_peft.cli"]


class RunStreamer:
    """Prints what is new in the folder of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.offsets = dict.fromkeys(JSONL_FILES, 0)
        self.seen: dict[str, str] = {}

    def print_new(self) -> None:
        """Prints what is new since the last time."""
        for name in JSONL_FILES:
            file = self.folder / name
            if file.is_file():
                text = file.read_bytes()[self.offsets[name] :]
                text = text[: text.rfind(b"\n") + 1]
                self.offsets[name] += len(text)
                for line in text.decode("utf-8").splitlines():
                    self._print(name, line)
        for name in JSON_FILES:
            file = self.folder / name
            if file.is_file():
                content = json.dumps(json.loads(file.read_text(encoding="utf-8")))
                if self.seen.get(name) != content:
                    self.seen[name] = content
                    self._print(name, content)

    def _print(self, name: str, line: str) -> None:
        print(LINE_PREFIX + json.dumps({"file": name, "line": line}), flush=True)


def main() -> int:
    """Trains, streams, pushes; returns the exit code of the training, or else of the push."""
    folder = Path("run")
    folder.mkdir(exist_ok=True)
    recipe = Path("recipe.yaml")
    recipe.write_text(os.environ["RECIPE"], encoding="utf-8")
    streamer, ended = RunStreamer(folder), threading.Event()

    def stream() -> None:
        while not ended.wait(INTERVAL_SECONDS):
            streamer.print_new()

    threading.Thread(target=stream, daemon=True).start()
    training = subprocess.Popen([*COMMAND, "fit", f"--config={recipe}", f"--run_dir={folder}"])
    # A job that is cancelled or runs out of time saves what it has.
    signal.signal(signal.SIGTERM, lambda *_: training.send_signal(signal.SIGINT))
    code = training.wait()
    ended.set()
    time.sleep(0.1)
    streamer.print_new()
    repository = os.environ.get("PUSH_TO")
    if repository and (folder / "checkpoints").is_dir():
        words = ["export", str(folder), "exported", f"--push-to={repository}"]
        pushed = subprocess.run([*COMMAND, *words], check=False).returncode
        code = code or pushed
    return code


if __name__ == "__main__":
    sys.exit(main())
