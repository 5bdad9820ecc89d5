"""Trying a real, small model on the page: answers side by side, blind votes, who may do what."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import psutil
import pytest
from image_text_models import saved_adapter
from PIL import Image

from gradio_app.runs.store import RunStore
from gradio_app.runs.types import Run
from gradio_app.settings import Settings
from lightning_peft.data.image_turns import MARK
from lightning_peft.data.prompts import PromptCollector
from lightning_peft.data.samples import Sample
from lightning_peft.data.templates import NAMED
from lightning_peft.runs.status import write_json
from tests.app.attacking import call
from tests.app.browsing import PHONE, assert_readable, screenshot, violations
from tests.app.servers import Server
from tests.app.visitors import HERS, HIS, owner_with

QUESTION = "What does `len` do?"
SYSTEM = "You know Python."
EARLIER = [("user", "And `abs`?"), ("assistant", "It drops the sign.")]
ANSWER = "Return the number of items in a container."


def drawing(folder: Path, colour: str) -> Path:
    path = folder / f"{colour}.png"
    Image.new("RGB", (20, 16), colour).save(path)
    return path


def tried(store: RunStore, owner: str, trained: Path) -> Run:
    """Makes a finished run of adapters that were really trained."""
    run = store.create(owner, "seed_everything: 0\n", "Tiny model")
    for name, step in (("best", 6), ("last", 8)):
        adapter = run.folder.checkpoints / "adapters" / name
        shutil.copytree(next((trained / "checkpoints" / "adapters").iterdir()), adapter)
        metadata = json.loads((adapter / "provenance.json").read_text())
        metadata |= {"global_step": step, "chat_template": NAMED["plain"]}
        write_json(adapter / "provenance.json", metadata)
    prompts = (QUESTION, "What is `decimal.Context`?", "Which module provides `Decimal`?")
    rows = [[("system", SYSTEM), *EARLIER, ("user", prompts[0]), ("assistant", ANSWER)]]
    rows += [[("user", prompt), ("assistant", ANSWER)] for prompt in prompts[1:]]
    turns = [[{"role": role, "content": text} for role, text in row] for row in rows]
    system = {"text": SYSTEM, "rows": 280, "of": 320}
    write_json(run.folder.prompts, {"system": system, "held_out": turns})
    return finished(store, run)


def finished(store: RunStore, run: Run) -> Run:
    now = run.status.updated
    status = {"state": "finished", "phase": "finished", "step": 8, "total_steps": 8}
    write_json(run.folder.status_file, {**status, "kind": "fit", "started": now, "updated": now})
    return store.get(run.owner, run.id)


@pytest.fixture(scope="module")
def space(serve) -> Server:
    return serve(space=True)


@pytest.fixture(scope="module")
def store(space) -> RunStore:
    return RunStore(Settings.on_a_space(space.folder))


@pytest.fixture(scope="module")
def run(store, lora_run) -> Run:
    return tried(store, owner_with(HERS), lora_run)


def opened(visit, space: Server, run: Run, cookie: str, **options):
    page = visit(f"{space.url}/run?run={run.id}", cookie, **options)
    page.locator("h1").first.wait_for()
    page.get_by_role("tab", name="Playground").click()
    return page


def said(page, side: str) -> str:
    return page.locator(f"#try-{side} .bot").last.inner_text()


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.long)])
def test_ask_compare_vote_and_unload(space, store, run, visit, whole):
    page = opened(visit, space, run, HERS)
    page.set_default_timeout(180_000)
    page.get_by_text("No model is loaded").wait_for()
    # The system prompt of the data is there, and goes away at a click.
    system = page.get_by_label("System prompt")
    page.wait_for_function(
        f"document.querySelector('#try-system-prompt textarea').value === '{SYSTEM}'"
    )
    page.get_by_text("280 of 320 training rows have it").wait_for()
    page.get_by_role("button", name="Clear", exact=True).click()
    page.wait_for_function("document.querySelector('#try-system-prompt textarea').value === ''")
    page.get_by_role("button", name=QUESTION).click()
    page.get_by_text("Loading:").wait_for()
    assert system.input_value() == SYSTEM
    # The next question is written while the answer comes.
    page.get_by_label("Your question").fill("a next one")
    # Both have answered, differently, next to the answer of the data.
    page.get_by_text(re.compile(r"Tuned \(.+\):")).wait_for()
    page.locator("#try-reference").get_by_text(ANSWER).wait_for()
    for side in ("left", "right"):
        asked = page.locator(f"#try-{side} .user").all_inner_texts()
        assert [text.strip() for text in asked] == [EARLIER[0][1], QUESTION]
        assert page.locator(f"#try-{side}").get_by_text(EARLIER[1][1]).count() == 1
    assert page.get_by_label("Your question").input_value() == "a next one"
    assert re.search(r"\): \d+ tokens.* per second", page.locator("#try-notes").inner_text())
    first = {side: said(page, side) for side in ("left", "right")}
    assert first["left"] != first["right"]
    page.get_by_text("of memory").wait_for()
    screenshot(page, "playground")
    page.locator("#try-columns").scroll_into_view_if_needed()
    assert violations(page) == []
    # Somebody else waits until she is done.
    their_own = tried(store, owner_with(HIS), run.folder.path)
    other = opened(visit, space, their_own, HIS)
    other.get_by_text("Another user is chatting").wait_for()
    assert other.get_by_role("button", name="Ask", exact=True).is_disabled()
    # Another checkpoint, in a conversation of its own, and by the keyboard.
    page.get_by_label("Checkpoint").click()
    page.get_by_role("option", name="last (step 8)").click()
    # The column names it before it has answered.
    page.locator("#try-right").get_by_text("Tuned (step 8)", exact=True).wait_for()
    page.get_by_label("Your question").fill("And `max`?")
    page.get_by_label("Your question").press("Enter")
    page.get_by_text("Tuned (step 8):").wait_for()
    if whole:
        ask_again(page)
        blind(page, run)
        score(page)
    page.get_by_role("button", name="Unload").click()
    page.get_by_text("No model is loaded").wait_for()


def ask_again(page) -> None:
    """The last question with other settings, once more, and changed."""
    page.get_by_text("Settings", exact=True).click()
    page.get_by_role("button", name="Balanced").click()
    page.wait_for_function("document.querySelector('[aria-label*=\"Top-p\"]').value === '0.9'")
    page.get_by_label("Repetition penalty").fill("1.5")
    before = said(page, "left")
    page.get_by_role("button", name="Regenerate").click()
    page.wait_for_function(
        "before => (document.querySelector('#try-left .bot')?.innerText ?? before) !== before",
        arg=before,
    )
    page.get_by_text("Tuned (step 8):").wait_for()
    asked = page.locator("#try-left .user").all_inner_texts()
    assert [text.strip() for text in asked] == ["And `max`?"]
    assert page.get_by_label("Seed").input_value() == "1"
    page.get_by_role("button", name="Greedy").click()
    page.get_by_role("button", name="Edit question").click()
    page.wait_for_function("!document.querySelector('#try-left .user')")
    assert page.get_by_label("Your question").input_value() == "And `max`?"
    assert page.get_by_role("button", name="Regenerate").is_disabled()


def score(page) -> None:
    page.get_by_label("Rows", exact=True).fill("2")
    page.get_by_role("button", name="Score", exact=True).click()
    scores = page.get_by_role("region", name="Score on held-out rows")
    answers = page.get_by_role("region", name="Answers to held-out rows")
    answers.wait_for()
    heads = [text.strip() for text in scores.locator("thead th").all_inner_texts()]
    assert heads == ["Base", "Tuned (step 8)"]
    rows = scores.locator("tbody th").all_inner_texts()
    assert rows == ["Exact match", "Token overlap"]
    assert scores.get_by_text("0 of 2 (0%)").count() == 2
    assert answers.locator("tbody tr").count() == 2
    assert answers.get_by_text(QUESTION).count() == 1
    assert answers.locator("tbody td").filter(has_text=ANSWER).count() >= 2
    assert page.locator("#try-score-stop").is_disabled()
    page.locator("#try-score").scroll_into_view_if_needed()
    screenshot(page, "playground-score")
    assert violations(page) == []


def blind(page, run: Run) -> None:
    page.get_by_label("Blind", exact=True).check()
    page.get_by_label("Your question").fill(QUESTION)
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_role("heading", name="Which answer is better?").wait_for()
    shown = page.locator("#try-columns").inner_text() + page.locator("#try-notes").inner_text()
    assert "Base" not in shown
    assert "Tuned" not in shown
    answers = {"a": said(page, "left"), "b": said(page, "right")}
    screenshot(page, "playground-blind")
    page.get_by_role("button", name="A is better").click()
    page.get_by_text("You chose the").wait_for()
    (vote,) = map(json.loads, (run.folder.path / "votes.jsonl").read_text().splitlines())
    assert vote["prompt"] == QUESTION
    assert vote["vote"] == "a"
    assert vote["outcome"] == vote["shown"]["a"]
    assert vote["checkpoint"] == "last"
    for side, who in vote["shown"].items():
        assert " ".join(answers[side].split()) == " ".join(vote["answers"][who].split())
    names = {"base": "the base", "tuned": "the tuned model"}
    page.get_by_text(f"A is {names[vote['shown']['a']]}").wait_for()
    assert page.locator(f"#try-tally .{vote['outcome']} strong").inner_text() == "1"


@pytest.fixture(scope="module")
def image_run(store, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("llava")
    _, adapter = saved_adapter(folder, "llava")
    run = store.create(owner_with(HERS), "seed_everything: 0\n", "Tiny model that sees")
    best = run.folder.checkpoints / "adapters" / "best"
    shutil.copytree(adapter, best)
    write_json(best / "provenance.json", {"global_step": 6})
    prompts = PromptCollector()
    turns = [
        {"role": "user", "content": f"{MARK}{QUESTION}"},
        {"role": "assistant", "content": "A"},
    ]
    prompts.add(Sample(messages=turns, images=(drawing(folder, "red").read_bytes(),)), "validation")
    prompts.write(run.folder.path)
    write_json(run.folder.provenance, {"task": "lightning_peft.tasks.image_text.ImageTextToText"})
    return finished(store, run)


@pytest.mark.long
def test_base_and_tuned_are_shown_images(space, image_run, visit, tmp_path):
    page = opened(visit, space, image_run, HERS)
    page.set_default_timeout(180_000)
    # A row of the data, with its image.
    page.get_by_role("button", name=QUESTION).click()
    page.get_by_text(re.compile(r"Tuned \(.+\):")).wait_for()
    first = {side: said(page, side) for side in ("left", "right")}
    assert first["left"] != first["right"]
    for side in ("left", "right"):
        page.locator(f"#try-{side} .user img").wait_for()
    page.locator("#try-reference").get_by_text("A", exact=True).wait_for()
    # One's own.
    page.get_by_role("button", name="New conversation").click()
    page.locator("#try-images input[type=file]").set_input_files(drawing(tmp_path, "blue"))
    page.locator("#try-images img").first.wait_for()
    page.get_by_label("Your question").fill(QUESTION)
    assert violations(page) == []
    screenshot(page, "playground-images")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_text(re.compile(r"Tuned \(.+\):")).wait_for()
    second = {side: said(page, side) for side in ("left", "right")}
    assert second["left"] != first["left"]
    assert second["right"] != first["right"]
    assert page.locator("#try-images img").count() == 0
    assert page.get_by_role("button", name="Remove images").count() == 0
    page.get_by_role("button", name="Edit question").click()
    page.locator("#try-images img").wait_for()
    loaded = "document.querySelector('#try-images img').naturalWidth === 20"
    page.wait_for_function(loaded)
    page.get_by_role("button", name="Remove images").click()
    page.wait_for_function("!document.querySelector('#try-images img')")
    assert violations(page) == []
    page.get_by_role("button", name="Score", exact=True).click()
    page.get_by_role("region", name="Answers to held-out rows").wait_for()
    page.locator("#try-images input[type=file]").set_input_files(
        {"name": "b.png", "mimeType": "image/png", "buffer": b"no image"}
    )
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_text("is not an image that Pillow reads").wait_for()


@pytest.mark.long
def test_what_cannot_talk_is_offered_no_chat(space, store, visit, lora_run):
    run = tried(store, owner_with(HERS), lora_run)
    task = "lightning_peft.tasks.text_classification.TextClassifier"
    write_json(run.folder.provenance, {"task": task})
    page = opened(visit, space, run, HERS)
    page.get_by_role("heading", name="This model cannot chat").wait_for()
    page.get_by_text("gives texts a label").wait_for()
    assert not page.get_by_role("button", name="Ask", exact=True).is_visible()
    screenshot(page, "playground-silent")


@pytest.mark.long
def test_on_a_phone_in_the_dark_and_while_a_run_trains(space, store, run, visit):
    owner = owner_with(HERS)
    busy = store.create(owner, "seed_everything: 0\n", "Training now")
    page = opened(visit, space, run, HERS, viewport=PHONE, color_scheme="dark")
    page.get_by_role("button", name="Ask", exact=True).wait_for()
    assert_readable(page)
    screenshot(page, "playground-phone")
    status = {"state": "running", "phase": "training", "step": 1, "total_steps": 9, "kind": "fit"}
    me = {"pid": os.getpid(), "process_started": psutil.Process().create_time()}
    write_json(busy.folder.status_file, {**status, **me, "started": 1.0, "updated": 1.0})
    page.get_by_text("Training now uses this machine now").wait_for()
    assert page.get_by_role("button", name="Ask", exact=True).is_disabled()
    assert page.get_by_role("button", name="Load", exact=True).is_disabled()
    write_json(busy.folder.status_file, {**status, "state": "finished"})
    page.get_by_text("No model is loaded").wait_for()


@pytest.mark.long
def test_before_the_first_checkpoint(space, store, visit):
    owner = owner_with(HERS)
    page = opened(visit, space, store.create(owner, "seed_everything: 0\n", "New"), HERS)
    page.get_by_text("available when the first checkpoint is saved").wait_for()
    assert page.get_by_role("button", name="Ask", exact=True).count() == 0


@pytest.mark.long
def test_nobody_asks_a_model_of_another(space, run):
    """Called as a page would, with the id of a run that belongs to someone else."""
    with space.client(HIS) as client:
        config = client.get("/config").json()
        names = {one["id"]: one["props"].get("elem_id") for one in config["components"]}
        tab = [
            one
            for one in config["dependencies"]
            if any(str(names.get(target)).startswith("try-") for target, _ in one["targets"])
        ]
        assert len(tab) > 10
        for one in tab[: len(tab) // 2]:
            text = call(client, one, [run.id] * len(one["inputs"]))
            assert "Tiny model" not in text
            assert ANSWER not in text
    assert (
        not (run.folder.path / "votes.jsonl").exists()
        or len((run.folder.path / "votes.jsonl").read_text().splitlines()) == 1
    )
