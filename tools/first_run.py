"""Times a newcomer's first run: from the start of the page to the first step of a training.

``python -m tools.first_run`` starts the page of the checkout that Python imports, trains SmolLM2 on
a file below the data root by real clicks in Chromium, and prints as JSON the clicks, the words on
the two pages on the way, and the seconds to each point, by the clock and of processors. The latter
do not depend on what else the machine does. The time that a person reads is not in them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from gradio_app.runs.store import RunStore
from gradio_app.settings import Settings
from gradio_app.visitors import LOCAL
from lightning_peft.recipe_files import recipes_folder
from tools.page_words import browser, page_server, words_shown

DATA = "small/data/orders.jsonl"
_LONG = 3_600_000
COUNT_CLICKS = """addEventListener('pointerdown', () => {
  sessionStorage.clicks = Number(sessionStorage.clicks ?? 0) + 1;
}, { capture: true })"""


def main() -> int:
    """Measures and prints."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(recipes_folder() / DATA, folder / "mine.jsonl")
        found = _first_run(folder)
    print(json.dumps({"load_at_end": round(os.getloadavg()[0], 1), **found}, indent=1))
    return 0


def _first_run(folder: Path) -> dict[str, Any]:
    begun, points = time.monotonic(), {}
    words = 0
    with page_server(folder) as (url, server), browser() as opened:

        def reached(point: str) -> None:
            seconds = _processor_seconds(psutil.Process(server.pid))
            points[point] = [round(time.monotonic() - begun, 1), round(seconds, 1)]
            print(point, points[point], file=sys.stderr)

        page = opened.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(_LONG)
        page.context.add_init_script(COUNT_CLICKS)
        page.goto(url)
        page.get_by_text("No runs yet.").wait_for()
        reached("first page")
        words += words_shown(page)
        page.get_by_role("link", name="Choose data").click()
        page.locator("#model-facts .chosen").wait_for()
        reached("new run")
        page.locator("#data-place").get_by_role("combobox").click()
        page.get_by_role("option", name="mine.jsonl").click()
        page.locator("#overview .fine").wait_for()
        reached("ready to start")
        words += words_shown(page)
        page.get_by_role("button", name="Start training").click()
        page.wait_for_url("**/run?run=*")
        reached("page of the run")
        store, run_id = RunStore(Settings(runs=folder / "runs")), page.url.partition("run=")[2]
        while not (run := store.get(LOCAL, run_id)).status.step:
            if not (run.active or run.waiting):
                raise RuntimeError(f"The run ended without a step: {run.status}")
            time.sleep(0.2)
        reached("first step")
        page.get_by_text(re.compile(r"step \d+ of")).wait_for()
        clicks = int(page.evaluate("sessionStorage.clicks"))
        record = json.loads((run.folder.path / "proc.json").read_text("utf-8"))
        run_process = psutil.Process(record["pid"])
        run_process.terminate()
        run_process.wait(600)
    return {"clicks": clicks, "words": words, "seconds: clock, processors": points}


def _processor_seconds(process: psutil.Process) -> float:
    """Returns those of a process and of all that it has started, runs and what has ended too."""
    found = [process, *process.children(recursive=True)]
    # The last two fields are of children that have ended.
    return sum(sum(one.cpu_times()[:4]) for one in found)


if __name__ == "__main__":
    sys.exit(main())
