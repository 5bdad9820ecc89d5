"""Which loggers get a table, and as what; `tests/cli/test_trackers.py` has the real ones."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_peft.plugin.namespace import ROOTS, bind_to_lightning
from lightning_peft.tasks.callbacks import LogSamples
from lightning_peft.tasks.samples import GeneratedSample
from lightning_peft.tasks.tables import log_table

COLUMNS, ROWS = ["text", "score"], [["a|b\nc", 1.5], ["d", None]]


class Calls:
    """Has the given methods, and records how they are called."""

    def __init__(self, *names: str, **attributes: Any) -> None:
        self.calls: list[Any] = []
        for name in names:
            setattr(self, name, lambda *given, **named: self.calls.append((given, named)))
        vars(self).update(attributes)


class Refusing(SimpleNamespace):
    """A logger whose service cannot be reached."""

    def log_table(self, *given: Any, **named: Any) -> None:
        raise OSError("no service")


def test_weights_and_biases() -> None:
    logger = Calls("log_table")
    log_table(logger, "errors", COLUMNS, ROWS, 3)
    assert logger.calls == [(("errors",), {"columns": COLUMNS, "data": ROWS, "step": 3})]


def test_mlflow() -> None:
    client = Calls("log_table")
    log_table(Calls(experiment=client, run_id="7"), "errors", COLUMNS, ROWS, 3)
    table = {"step": [3, 3], "text": ["a|b\nc", "d"], "score": [1.5, None]}
    assert client.calls == [(("7", table, "errors.json"), {})]


def test_tensorboard() -> None:
    writer = Calls("add_text")
    log_table(Calls(experiment=writer), "errors", COLUMNS, ROWS, 3)
    text = "| text | score |\n| --- | --- |\n| a\\|b<br>c | 1.5 |\n| d | None |"
    assert writer.calls == [(("errors", text, 3), {})]


def test_others_are_left_alone() -> None:
    # Comet's experiment has a method of this name that takes other arguments.
    comet = Calls("log_table")
    for logger in (Calls(experiment=comet), Calls(experiment=None)):
        log_table(logger, "errors", COLUMNS, ROWS, 3)
    assert not comet.calls


def test_a_tracker_that_refuses_ends_no_training(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "lightning_peft")
    last = Calls("log_table")
    trainer = SimpleNamespace(callbacks=[], loggers=[Refusing(), last], global_step=2)
    callback = bind_to_lightning(LogSamples, ROOTS[0])()
    for _ in range(2):
        callback._log(trainer, [GeneratedSample(prompt="p", expected="e", generated="g")], 2)
    (warning,) = caplog.messages
    assert "Refusing takes no samples: OSError('no service')" in warning
    assert [named["data"] for _, named in last.calls] == [[["p", "e", "g"]]] * 2
