"""Real servers of the page, each a process of its own with folders of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from gradio_app.visitors import COOKIE

ROOT = Path(__file__).parents[2]
# Generous: on a busy machine everything takes longer, and only a failure waits to the end.
START_SECONDS = 240
SERVE = Path(__file__).with_name("serve.py")


@dataclass
class Server:
    """A server that can be stopped, killed and started again on the same folders and port.

    ``options`` are fields of ``Settings`` in JSON, besides ``trainer``: ``"real"`` for the command
    line, ``"fake"`` for one that only writes the folder of a run. ``env`` is added to its
    environment; ``None`` takes a variable away.
    """

    folder: Path
    options: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str | None] = field(default_factory=dict)
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def start(self) -> Server:
        for name in ("runs", "data", "models", "cwd", "tmp"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        if not self.port:
            with socket.socket() as opened:
                opened.bind(("127.0.0.1", 0))
                self.port = opened.getsockname()[1]
        words = [str(self.folder), str(self.port), json.dumps(self.options)]
        env = environment(self.folder) | self.env
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(SERVE), *words],
                cwd=self.folder / "cwd",
                env={name: value for name, value in env.items() if value is not None},
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        self._wait()
        return self

    def _wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            assert self.process is not None
            if self.process.poll() is not None:
                break
            try:
                with urllib.request.urlopen(self.url, timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        self.stop()
        raise AssertionError(f"the page did not start:\n{self.log()}")

    def client(self, cookie: str = "") -> httpx.Client:
        """Returns a client of the page, of the visitor with that cookie."""
        cookies = {COOKIE: cookie} if cookie else {}
        return httpx.Client(base_url=self.url, cookies=cookies, timeout=30, trust_env=False)

    def log(self) -> str:
        return (self.folder / "server.log").read_text(errors="replace")

    def stop(self, how: int = signal.SIGTERM) -> int:
        if self.process is None:
            return 0
        self.process.send_signal(how)
        try:
            code = self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.process = None
        return code


def environment(folder: Path) -> dict[str, str]:
    """Returns an environment in which nothing is fetched, and nothing is written elsewhere."""
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "GRADIO_TEMP_DIR": str(folder / "tmp"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "PYTHONPATH": str(ROOT),
        # A request that tried to leave this machine would fail at once.
        "HTTP_PROXY": "http://127.0.0.1:9",
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "PYTHONUNBUFFERED": "1",
    }
