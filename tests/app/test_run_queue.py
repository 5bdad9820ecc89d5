"""The line of runs: one at a time, in order, across servers, within what a visitor may use."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

import psutil
import pytest

from gradio_app.errors import UserError
from gradio_app.runs.files import read_json_object
from gradio_app.runs.run_queue import RunQueue
from gradio_app.runs.store import RunStore
from gradio_app.settings import Limits
from gradio_app.studio import Studio
from gradio_app.uploads import drop_expired
from tests.app.runs import queued, recipe, settings, until
from tests.app.test_store import written

LONG = {"steps": 2_000, "seconds": 0.02}


@pytest.fixture
def store(tmp_path):
    return RunStore(settings(tmp_path))


@pytest.fixture
def lines(store):
    """Makes lines; at the end nothing that they started is left."""
    made: list[RunQueue] = []

    def line(**changes):
        made.append(RunQueue(replace(store.settings, **changes), store))
        return made[-1]

    yield line
    for one in made:
        one.close()
    for run in store.all():
        record = read_json_object(run.folder.path / "proc.json")
        if record and store.executor(run).active(run):
            os.killpg(record["pid"], signal.SIGKILL)


def state(store, run):
    return store.get(run.owner, run.id).status.state


def test_runs_are_carried_out_one_after_the_other(store, lines):
    first, second = (queued(store, name, steps=4) for name in ("first", "second"))
    lines()
    until(lambda: state(store, first) in ("preparing", "running"))
    assert state(store, second) == "queued"
    until(lambda: state(store, second) == "finished")
    one, two = (store.get("local", run.id) for run in (first, second))
    assert one.status.state == "finished"
    assert two.metadata.launched > one.status.updated - 1
    assert one.checkpoints()[-1].step == 4


def test_stop_and_go_on_where_it_stopped(store, lines):
    run = queued(store, "a", **LONG)
    line = lines()
    until(lambda: store.get("local", run.id).status.step > 2)
    line.stop("local", run.id)
    until(lambda: state(store, run) == "stopped")
    stopped = store.get("local", run.id)
    assert stopped.can_resume
    assert stopped.checkpoint_step == stopped.status.step
    assert line.add(stopped, resume=True).metadata.from_step == stopped.status.step
    until(lambda: state(store, run) == "running")
    assert store.get("local", run.id).status.step >= stopped.status.step
    events = (run.folder.path / "events.jsonl").read_text()
    assert f"Training starts at step {stopped.status.step}" in events
    # The name and the owner are what they were.
    assert store.get("local", run.id).name == "a"


def test_a_process_that_does_not_listen_is_ended_by_force(store, lines):
    run = queued(store, "a", **LONG)
    store.executors["local"].grace = 0.2
    line = lines()
    until(lambda: store.get("local", run.id).status.step > 0)
    pid = store.get("local", run.id).status.pid
    os.kill(pid, signal.SIGSTOP)
    line.kill("local", run.id)
    until(
        lambda: not psutil.pid_exists(pid) or not store.executors["local"].in_progress(run.folder)
    )
    assert state(store, run) == "stopped"


def test_a_stop_before_the_first_step_ends_the_run(store, lines):
    run = queued(store, "a", start_seconds=30)
    line = lines()
    until(lambda: state(store, run) == "preparing")
    line.stop("local", run.id)
    until(lambda: state(store, run) == "stopped")


def test_a_number_that_belongs_to_another_process_is_left_alone(store):
    run = store.create("local", recipe(), "a")
    me = psutil.Process()
    (run.folder.path / "proc.json").write_text(f'{{"pid": {me.pid}, "created": 1.0}}')
    written(run.folder.path, process_started=1.0)
    executor = store.executors["local"]
    executor._signal(run.folder, signal.SIGKILL, group=True)
    assert not executor.active(run)


def test_what_runs_on_the_command_line_makes_the_machine_busy(store, lines):
    written(store.root / "of-the-command-line")
    run = queued(store, "a", steps=2)
    line = lines()
    line.process_pending()
    assert line.active().id == "of-the-command-line"
    assert state(store, run) == "queued"
    written(store.root / "of-the-command-line", state="finished")
    until(lambda: state(store, run) == "finished")


def test_order_and_cancel_are_each_owners_own(store, lines):
    written(store.root / "busy")
    line = lines()
    runs = [store.create(owner, recipe(), owner) for owner in ("v-a", "v-b", "v-a", "v-a")]
    a1, b1, a2, a3 = (line.add(run).id for run in runs)
    assert [run.id for run in line.order()] == [a1, b1, a2, a3]
    line.move("v-a", a3, -1)
    assert [run.id for run in line.order()] == [a1, b1, a3, a2]
    line.move("v-a", a3, -5)
    # Before the other's run only on a place that was one's own.
    assert [run.id for run in line.order()] == [a3, b1, a1, a2]
    with pytest.raises(UserError):
        line.move("v-a", b1, 1)
    with pytest.raises(UserError):
        line.cancel("v-a", b1)
    line.cancel("v-b", b1)
    assert [run.id for run in line.order()] == [a3, a1, a2]
    assert line.place(store.get("v-a", a2)) == 3
    again = RunQueue(store.settings, RunStore(store.settings))
    assert [run.id for run in again.order()] == [a3, a1, a2]
    again.close()


def test_a_visitor_has_so_many_runs_at_a_time(store, lines):
    written(store.root / "busy")
    line = lines(limits=Limits(waiting=1))
    line.add(store.create("v-a", recipe(), "one"))
    with pytest.raises(UserError) as refusal:
        line.add(store.create("v-a", recipe(), "two"))
    assert refusal.value.key == "run.refused_waiting"
    line.add(store.create("v-b", recipe(), "three"))


def test_a_waiting_run_that_was_deleted_rests_once_it_is_restored(store, lines):
    written(store.root / "busy")
    line = lines(limits=Limits(waiting=1))
    first = line.add(store.create("v-a", recipe(), "one"))
    line.delete("v-a", first.id)
    line.add(store.create("v-a", recipe(), "two"))
    assert not store.restore("v-a", first.id).waiting
    with pytest.raises(UserError, match="run.refused_waiting"):
        line.add(first)
    # One that an older version deleted while it waited.
    store.update_metadata(first, waiting=time.time())
    store.delete("v-a", first.id)
    assert not store.restore("v-a", first.id).waiting


def test_nothing_waits_twice_and_nothing_goes_on_without_a_checkpoint(store, lines):
    written(store.root / "busy")
    line = lines()
    run = store.create("local", recipe(), "a")
    with pytest.raises(UserError) as refusal:
        line.add(run, resume=True)
    assert refusal.value.key == "run.refused_resume"
    line.add(run)
    with pytest.raises(UserError):
        line.add(run)


def test_a_run_that_takes_too_long_is_stopped_and_saved(store, lines):
    run = queued(store, "a", **LONG)
    # Without a limit until it trains: before, it would not save.
    lines()
    until(lambda: state(store, run) == "running")
    lines(limits=Limits(minutes=0))
    until(lambda: state(store, run) == "stopped")
    stopped = store.get("local", run.id)
    assert stopped.metadata.out_of_time
    assert stopped.folder.newest_checkpoint().name == "interrupted.ckpt"


def test_visitors_runs_are_deleted_after_some_hours(store, lines):
    old, mine = store.create("v-a", recipe(), "old"), store.create("local", recipe(), "mine")
    new = store.create("v-a", recipe(), "new")
    for run in (old, mine):
        store.update_metadata(run, created=time.time() - 25 * 3600)
    lines(limits=Limits(keep_hours=24)).process_pending()
    assert {run.id for run in store.all()} == {mine.id, new.id}


def test_visitors_uploads_are_deleted_after_some_hours_unless_a_run_names_them(store, lines):
    names = [f"20261126-0000000{n}-rows.jsonl" for n in range(4)]
    unused, named, of_deleted, new = names
    folder, gone = (store.settings.uploads / owner for owner in ("v-a", "v-gone"))
    files = [folder / name for name in names] + [store.settings.uploads / "local" / unused]
    for file in [*files, gone / unused]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    old = time.time() - 25 * 3600
    for file in [*files, gone / unused]:
        if file.name != new:
            os.utime(file, (old, old))
    # A run that waits keeps its file; so does one that can still be restored.
    run = store.create("v-a", f"data: {folder / named}\n", "waits")
    store.update_metadata(run, waiting=time.time() + 3600, created=old)
    store.delete("v-a", store.create("v-a", f"data: {folder / of_deleted}\n", "deleted").id)
    # Another visitor's recipe keeps nothing.
    store.create("v-b", f"data: {folder / unused}\n", "theirs")
    line = lines(limits=Limits(keep_hours=24), max_concurrent_runs=0)
    line.process_pending()
    assert {file for file in files if file.exists()} == set(files[1:])
    assert not any(gone.iterdir())
    os.utime(gone, (old, old))
    line._sweep()
    assert folder.is_dir()
    assert not gone.exists()


def test_an_upload_stays_while_a_recipe_cannot_be_read_and_others_are_still_deleted(store):
    old, files = time.time() - 25 * 3600, {}
    for owner in ("v-a", "v-b", "v-c", "v-d"):
        file = files[owner] = store.settings.uploads / owner / "20261126-00000000-rows.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("{}")
        os.utime(file, (old, old))
    run = store.create("v-a", f"data: {files['v-a']}\n", "being written")
    run.folder.recipe.write_text("")
    made = []

    def recipes(owner):
        if owner == "v-b":
            raise PermissionError(owner)
        found = store.recipes(owner)
        if owner == "v-c" and not made:
            # A run that is made between the first look and the deletion.
            made.append(store.create(owner, f"data: {files[owner]}\n", "new"))
        return found

    drop_expired(replace(store.settings, limits=Limits(keep_hours=24)), recipes)
    assert made
    assert {owner for owner, file in files.items() if file.exists()} == {"v-a", "v-b", "v-c"}


def test_a_run_that_cannot_wait_is_not_kept(tmp_path):
    studio = Studio(settings(tmp_path, limits=Limits(waiting=0)))
    with pytest.raises(UserError, match="refused_waiting"):
        studio.start("local", recipe(), "mine")
    assert studio.store.list("local") == []
    studio.close()
