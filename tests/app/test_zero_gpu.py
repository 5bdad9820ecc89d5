"""Runs inside calls that are lent a GPU, by one that calls as ZeroGPU does, but has no GPU."""

from __future__ import annotations

import contextvars
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import yaml

from gradio_app.recipe.edits import base_recipe
from gradio_app.recipe.yaml_text import dump_yaml
from gradio_app.runs.local import LocalExecutor
from gradio_app.runs.run_queue import RunQueue
from gradio_app.runs.store import RunStore
from gradio_app.runs.zero_gpu import EXECUTOR, ZeroGpuExecutor
from gradio_app.settings import Settings
from tests.app import fake_trainer
from tests.app.runs import settings, until

# Whose event it is, as Gradio keeps it while a handler runs.
visitor = contextvars.ContextVar("visitor", default="nobody")
LONG = {"steps": 2_000, "seconds": 0.02}


class NoQuota(Exception):
    title = "ZeroGPU quota exceeded"


class GpuDecorator:
    """Forks a process for each call, and calls in a thread of it; notes who pays for how long."""

    def __init__(self):
        self.paid, self.refuses = [], False

    def __call__(self, duration):
        def decorated(call):
            def lent(*given):
                if self.refuses:
                    raise NoQuota("Sign in for more.")
                self.paid.append((visitor.get(), duration))
                here, there = multiprocessing.Pipe()
                process = multiprocessing.get_context("fork").Process(
                    target=self.work, args=(there, call, given), daemon=True
                )
                process.start()
                there.close()
                try:
                    return here.recv()
                except EOFError:
                    raise RuntimeError("GPU task aborted") from None
                finally:
                    process.join()

            return lent

        return decorated

    @staticmethod
    def work(pipe, call, given):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ["CUDA_VISIBLE_DEVICES"] = "GPU-lent"
        with ThreadPoolExecutor() as pool:
            pipe.send(pool.submit(call, *given).result())


def executors(made, lender):
    return {EXECUTOR: ZeroGpuExecutor(made, lender), "local": LocalExecutor(made)}


@pytest.fixture
def lender():
    return GpuDecorator()


@pytest.fixture
def store(tmp_path, lender, monkeypatch):
    monkeypatch.setattr("lightning_peft.cli.main", fake_trainer.main)
    # Threads that are not the main one cannot set handlers of signals; the real trainer knows.
    monkeypatch.setattr(fake_trainer.signal, "signal", lambda number, handler: None)
    made = settings(tmp_path)
    return RunStore(made, executors(made, lender))


@pytest.fixture
def line(store):
    made = RunQueue(store.settings, store)
    yield made
    made.close()
    executor = store.executors[EXECUTOR]
    for run in store.all():
        if executor.active(run):
            executor.kill(run)
            until(lambda run=run: not executor.active(run))


def asked_by(name, line, run, **how):
    """Puts a run into the line in the event of a visitor."""

    def add():
        visitor.set(name)
        line.add(run, **how)

    thread = threading.Thread(target=contextvars.Context().run, args=(add,))
    thread.start()
    thread.join()


def get(store, run):
    return store.get(run.owner, run.id)


def state(store, run):
    return get(store, run).status.state


def test_a_run_is_paid_by_who_asks_and_leaves_this_process_as_it_was(store, line, lender):
    environment, folder = dict(os.environ), os.getcwd()
    run = store.create("v-a", yaml.safe_dump({"fake": {"steps": 3}}), "lent")
    assert run.metadata.where == EXECUTOR
    asked_by("ann", line, run)
    until(lambda: state(store, run) == "finished")
    assert lender.paid == [("ann", 120)]
    assert (dict(os.environ), os.getcwd()) == (environment, folder)
    until(lambda: not store.executors[EXECUTOR].active(get(store, run)))
    assert "step 3" in run.folder.log.read_text()
    store.delete("v-a", run.id)


def test_stopped_and_resumed_by_another_visitor(store, line, lender):
    run = store.create("local", yaml.safe_dump({"fake": LONG}), "lent")
    asked_by("ann", line, run)
    until(lambda: get(store, run).status.step > 2)
    line.stop("local", run.id)
    until(lambda: state(store, run) == "stopped")
    step = get(store, run).status.step
    until(lambda: not store.executors[EXECUTOR].active(get(store, run)))
    asked_by("bob", line, get(store, run), resume=True)
    until(lambda: get(store, run).status.step > step)
    assert [who for who, _ in lender.paid] == ["ann", "bob"]
    line.kill("local", run.id)
    until(lambda: state(store, run) == "stopped")


def test_what_the_lender_refuses_is_reported(store, line, lender):
    lender.refuses = True
    run = store.create("local", yaml.safe_dump({"fake": LONG}), "no quota")
    line.add(run)
    log = run.folder.path / "start.log"
    until(log.is_file)
    until(lambda: state(store, run) == "failed")
    assert log.read_text() == "ZeroGPU quota exceeded Sign in for more.\n"


def test_a_space_with_zero_gpu_lends_for_less_than_two_minutes(tmp_path, monkeypatch):
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    found = Settings.on_a_space(tmp_path)
    assert (found.zero_gpu, found.limits.minutes) == (True, 1.5)
    monkeypatch.delenv("SPACES_ZERO_GPU")
    assert not Settings.on_a_space(tmp_path).zero_gpu


@pytest.mark.long
def test_the_real_command_line_trains_in_a_lent_call(tmp_path, lender):
    made = replace(settings(tmp_path), command=Settings().command)
    store = RunStore(made, executors(made, lender))
    line = RunQueue(made, store)
    run = store.create("v-a", dump_yaml(base_recipe("sft", "qlora")), "real")
    try:
        asked_by("ann", line, run)
        until(lambda: state(store, run) in ("finished", "failed"), 180)
    finally:
        line.close()
    assert state(store, run) == "finished", (run.folder.path / "start.log").read_text()
    assert get(store, run).status.step == 12
