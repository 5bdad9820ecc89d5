"""Whether a server of the web page, and the pages themselves, grow while they are used for long.

``python benchmarks/soak.py [--minutes N] [--bound MB]`` starts a server whose runs are carried out
by the stand-in of the tests, and opens pages in Chromium: one watches a run for all of the time,
one stays at home, and one starts runs, reloads and stops them. Each half minute it writes the
memory of the server's process (resident) and of the scripts of the two pages that stay (their heap
after a collection). At the end it prints the slopes of the last two thirds by least squares, and
what two idle pages ask of the server. It ends with 1 if the server grows faster than the bound.

A few minutes say little: the server first fills its caches. Nothing is recorded in the docs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

MEGABYTE = 1e6
SAMPLE_SECONDS = 30.0
STEP_SECONDS = 0.2


@dataclass
class Sample:
    """What was measured at one moment: resident bytes of the server, and bytes of pages' heaps."""

    minutes: float
    server: float
    watching: float
    home: float
    runs: int


@dataclass
class Traffic:
    """What one page asks of the server, as Chromium tells it."""

    requests: int = 0
    # Bytes of each answer, with what has come of those that are still open.
    received: dict[str, float] = field(default_factory=dict)

    def listen(self, page: Any) -> None:
        """Begins to count."""
        session = page.context.new_cdp_session(page)
        session.on("Network.requestWillBeSent", self._sent)
        session.on("Network.dataReceived", self._came)
        session.on("Network.loadingFinished", self._ended)
        session.send("Network.enable")

    def _sent(self, event: Any) -> None:
        self.requests += 1

    def _came(self, event: Any) -> None:
        before = self.received.get(event["requestId"], 0.0)
        self.received[event["requestId"]] = before + event["dataLength"]

    def _ended(self, event: Any) -> None:
        self.received[event["requestId"]] = event["encodedDataLength"]


def slope(samples: Sequence[Sample], of: str) -> float:
    """Returns by how many MB an hour something grows, over the last two thirds of the samples."""
    rows = [(one.minutes / 60, getattr(one, of) / MEGABYTE) for one in samples]
    rows = rows[len(rows) // 3 :]
    if len(rows) < 2:
        return float("nan")
    mean_x = sum(x for x, _ in rows) / len(rows)
    mean_y = sum(y for _, y in rows) / len(rows)
    spread = sum((x - mean_x) ** 2 for x, _ in rows)
    return sum((x - mean_x) * (y - mean_y) for x, y in rows) / spread


class Soak:
    """The server, which is started already, the pages, and what is done with them."""

    def __init__(self, server: Any, browser: Any, minutes: float) -> None:
        from gradio_app.runs.store import RunStore
        from tests.app.runs import settings

        self.server, self.browser, self.minutes = server, browser, minutes
        self.store = RunStore(settings(server.folder))
        self.samples: list[Sample] = []
        self.runs = 0
        steps = int((minutes + 10) * 60 / STEP_SECONDS)
        self.watched = self._queued("watched", steps)
        self.watching = self._page(f"run?run={self.watched.id}")
        self.home = self._page("")
        self.user = self._page("")
        self._heaps = [self._session(page) for page in (self.watching, self.home)]

    def _queued(self, name: str, steps: int) -> Any:
        from tests.app.runs import queued

        return queued(self.store, name, steps=steps, seconds=STEP_SECONDS, validate_every=50)

    def _page(self, place: str) -> Any:
        from tests.app.browsing import open_context

        page = open_context(self.browser).new_page()
        page.goto(f"{self.server.url}/{place}")
        return page

    def _session(self, page: Any) -> Any:
        session = page.context.new_cdp_session(page)
        session.send("Performance.enable")
        return session

    def go(self) -> None:
        """Uses the pages until the time is over."""
        begun = time.monotonic()
        self._sample(begun)
        while time.monotonic() - begun < 60 * self.minutes:
            due = time.monotonic() + SAMPLE_SECONDS
            self._use()
            # The browser's own events are only heard while it is waited for.
            self.user.wait_for_timeout(max(0.0, due - time.monotonic()) * 1_000)
            self._sample(begun)
        self._stop(self.watching, self.watched)

    def _use(self) -> None:
        """Starts a run, looks at it, reloads, and stops it."""
        self.runs += 1
        run = self._queued(f"run {self.runs}", 10_000)
        self.user.goto(f"{self.server.url}/run?run={run.id}")
        self.user.get_by_role("status").get_by_text("Running").first.wait_for()
        self.user.reload()
        self.user.locator("#loss-plot svg.marks").wait_for()
        self._stop(self.user, run)
        self.user.goto(f"{self.server.url}/new")
        self.user.locator("#model-facts .chosen").wait_for(state="attached")

    def _stop(self, page: Any, run: Any) -> None:
        page.get_by_role("button", name="Stop & save").click()
        page.get_by_role("status").get_by_text("Stopped").first.wait_for()

    def _sample(self, begun: float) -> None:
        heaps = []
        for session in self._heaps:
            session.send("HeapProfiler.collectGarbage")
            metrics = session.send("Performance.getMetrics")["metrics"]
            heaps.append(next(one["value"] for one in metrics if one["name"] == "JSHeapUsedSize"))
        memory = psutil.Process(self.server.process.pid).memory_info().rss
        found = Sample((time.monotonic() - begun) / 60, memory, heaps[0], heaps[1], self.runs)
        self.samples.append(found)
        numbers = (found.server, found.watching, found.home)
        shown = " ".join(f"{number / MEGABYTE:10.1f}" for number in numbers)
        print(f"{found.minutes:7.1f} {shown} {found.runs:6d}", flush=True)

    def idle(self, seconds: float) -> dict[str, Traffic]:
        """Returns the requests of an ended run's page and of the home page in that time."""
        pages = {"run that has ended": self.watching, "home": self.home}
        found = {}
        for name, page in pages.items():
            page.reload()
            page.locator("h1").first.wait_for()
            # What opening a page asks is not what it asks when it is left alone.
            page.wait_for_timeout(5_000)
            found[name] = Traffic()
            found[name].listen(page)
        self.home.wait_for_timeout(seconds * 1_000)
        return found


def main() -> int:
    """Uses the page and returns whether it has grown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="for how long")
    parser.add_argument(
        "--bound", type=float, default=60.0, help="MB an hour by which the server may grow"
    )
    given = parser.parse_args()
    from playwright.sync_api import sync_playwright

    from tests.app.browsing import launch
    from tests.app.servers import Server

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        server = Server(Path(folder), {"trainer": "fake", "at_once": 2}).start()
        browser = launch(playwright)
        try:
            soak = Soak(server, browser, given.minutes)
            print("minutes  server MB watching MB  home MB   runs")
            soak.go()
            traffic = soak.idle(60.0)
        finally:
            browser.close()
            server.stop()
    print()
    for name in ("server", "watching", "home"):
        print(f"{name}: {slope(soak.samples, name):+.1f} MB an hour")
    for name, one in traffic.items():
        received = sum(one.received.values()) / 1e3
        print(f"idle, {name}: {one.requests} requests and {received:.1f} kB a minute")
    grown = slope(soak.samples, "server")
    if not grown <= given.bound:
        print(f"The server grows by {grown:.1f} MB an hour; {given.bound:g} are allowed.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
