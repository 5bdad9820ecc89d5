"""Two visitors of a Space at once: neither sees nor touches what the other has started."""

from __future__ import annotations

import json
import uuid

import pytest

from gradio_app.recipe.content import with_value
from gradio_app.recipe.edits import base_recipe, with_data
from gradio_app.recipe.yaml_text import dump_yaml
from gradio_app.runs.store import RunStore
from gradio_app.settings import Settings
from gradio_app.uploads import Uploads
from gradio_app.visitors import COOKIE, owner_of
from tests.app.attacking import Call, Handler, attack, called, handlers_of
from tests.app.runs import queued, until
from tests.app.visitors import HERS, HIS, Request, owner_with

NAME = "Nobody else knows"
ACTS = (
    "delete",
    "restore",
    "erase",
    "pick",
    "delete_picked",
    "earlier",
    "later",
    "leave",
    "download",
    "cancel",
)


@pytest.fixture(scope="module")
def store(space) -> RunStore:
    return RunStore(Settings.on_a_space(space.folder))


@pytest.fixture(scope="module")
def hers(store) -> str:
    """The id of a run that the first visitor has started and that goes on."""
    owner = owner_with(HERS)
    run = queued(store, NAME, owner, steps=100_000, seconds=0.05)
    until(lambda: store.get(owner, run.id).status.state == "running")
    return run.id


def test_the_second_visitor_sees_nothing_of_the_first(space, hers, visit):
    page = visit(space.url, HIS)
    for address in ("", f"run?run={hers}", f"compare?runs={hers},{hers}", f"new?from={hers}"):
        page.goto(f"{space.url}/{address}")
        page.locator("h1").first.wait_for()
        page.wait_for_load_state()
        page.wait_for_timeout(500)
        assert NAME not in page.inner_text("body"), address
        assert "Running" not in page.inner_text("body"), address
    # The first one finds it again.
    visit(space.url, HERS).get_by_role("link", name=NAME).first.wait_for()


def test_no_handler_lets_one_visitor_touch_the_run_of_another(space, store, hers):
    owner = owner_with(HERS)
    folder = store.get(owner, hers).folder
    before = {path.name for path in folder.path.iterdir()}
    asked = {"run": hers, "from": hers, "runs": f"{hers},{hers}"}
    clicks = [{"act": act, "run": hers, "export": "x"} for act in ACTS]

    def calls(one: Handler, number: int) -> list[Call]:
        return [Call([hers] * one.inputs, event, asked) for event in clicks if one.event] or [
            Call([hers] * one.inputs, None, asked)
        ]

    def check(one: Handler, text: str) -> None:
        assert NAME not in text, one

    with space.client(HIS) as client:
        groups = handlers_of(space, client)
        assert sum(map(len, groups)) > 100
        attack(client, groups, calls, check)
    step = store.get(owner, hers).status.step
    until(lambda: store.get(owner, hers).status.step > step)
    assert store.get(owner, hers).name == NAME
    new = {path.name for path in folder.path.iterdir()} - before
    assert not new & {"control.json", "votes.jsonl", "exports"}


@pytest.mark.parametrize("way", ["draft", "pasted"])
def test_a_recipe_that_names_the_upload_of_another_shows_none_of_it(space, tmp_path, way):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": NAME, "completion": "x"}))
    settings = Settings.on_a_space(space.folder)
    upload = Uploads(settings, owner_with(HERS)).save(file, "20261130")
    content = with_data(base_recipe("sft"), str(upload.path))
    if way == "draft":
        content = with_value(content, "model.init_args.model", str(upload.path))
    recipe, session = dump_yaml(content), uuid.uuid4().hex
    with space.client(HIS) as client:
        config = client.get("/config").json()
        names = {one["id"]: one["props"].get("elem_id") for one in config["components"]}
        triggers = {one["id"]: one["targets"] for one in config["dependencies"]}
        known = [one for group in handlers_of(space, client) for one in group]

        def click(name: str, *given: str) -> str:
            clicked = next(
                one for one in known if name in (names.get(by) for by, _ in triggers[one.number])
            )
            return called(client, clicked, [Call([None, *given])], session)

        (load,) = (one for one in known if one.name == "bind_page_load.<locals>.load")
        draft = {"recipe": recipe} if way == "draft" else None
        shown = called(client, load, [Call([draft])], session)
        if way == "pasted":
            shown = click("apply-yaml", recipe)
        assert upload.name in shown
        # Nor how large it is.
        assert "Weights:" not in shown
        for name, given in (("show", ["1"]), ("save", ["1", "{}"]), ("leave", ["1"])):
            answer = click(f"edit-row-{name}", *given)
            assert NAME not in answer
            assert "takes no paths" in answer
    assert not Uploads(settings, owner_with(HIS)).list()


def test_her_own_recipe_shows_no_folder_of_the_server(space, store, hers):
    owner = owner_with(HERS)
    folder = store.get(owner, hers).folder
    upload = space.folder / "uploads" / owner / "rows.jsonl"
    said = [upload, folder.path / "left-out.jsonl", folder.path]
    before = folder.recipe.read_text()
    folder.recipe.write_text(before + "".join(f"# {path}\n" for path in said))
    shown = []
    with space.client(HERS) as client:
        groups = [
            group for group in handlers_of(space, client) if group[0].name == "RunView.on_load"
        ]
        query = {"run": hers}
        attack(client, groups, lambda one, _: [Call([], None, query)], lambda _, t: shown.append(t))
    (text,) = shown
    assert "# upload:rows.jsonl" in text
    assert "# left-out.jsonl" in text
    # Gradio keeps what it offers for download in a folder of its own.
    assert not any(str(space.folder / name) in text for name in ("runs", "uploads"))


def test_its_owner_stops_it(space, store, hers, visit):
    page = visit(f"{space.url}/run?run={hers}", HERS)
    page.get_by_role("button", name="Stop & save").click()
    until(lambda: store.get(owner_with(HERS), hers).status.state == "stopped")


def test_who_asks():
    first, second = Request({COOKIE: HERS}), Request({COOKIE: HIS})
    assert owner_of(first, space=False) == "local"
    assert owner_of(first, space=True) == owner_of(first, space=True)
    assert owner_of(first, space=True) != owner_of(second, space=True)
    # The cookie itself is in no file of a run.
    assert HERS not in owner_of(first, space=True)
    strangers = {owner_of(Request({}), space=True) for _ in range(3)}
    strangers |= {owner_of(Request({COOKIE: value}), space=True) for value in ("x", HERS * 2)}
    assert len(strangers) == 5
    info = {"userinfo": {"preferred_username": "someone"}}
    assert owner_of(Request({}, {"oauth_info": info}), space=True) == "hf-someone"
    assert owner_of(Request({COOKIE: HERS}, {"oauth_info": "junk"}), space=True).startswith("v-")
