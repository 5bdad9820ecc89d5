import pytest
import torch

from lightning_peft.runs import throughput
from lightning_peft.runs.throughput import Throughput, rows_and_tokens

IDS = torch.zeros(3, 5, dtype=torch.int64)
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        ({"input_ids": IDS[:2, :3], "attention_mask": MASK}, (2, 3)),
        ({"input_ids": IDS, "attention_mask": torch.zeros(3, 1, 5, 5)}, (3, 15)),
        ((torch.zeros(4, 2), torch.zeros(4)), (4, 0)),
        ({"pixel_values": torch.zeros(6, 3, 8, 8)}, (6, 0)),
        ("words", (0, 0)),
        ([], (0, 0)),
    ],
)
def test_rows_and_tokens_of_a_batch(batch, size):
    assert rows_and_tokens(batch) == size


def test_rates_and_what_is_left(monkeypatch):
    now = iter([10.0, 12.0, 14.0])
    monkeypatch.setattr(throughput.time, "monotonic", lambda: next(now))
    measured = Throughput()
    measured.step(100)
    assert measured.rates() == {}
    assert measured.eta(5) is None
    for step in (101, 102):
        measured.add({"input_ids": IDS})
        measured.step(step)
    assert measured.rates() == {"steps": 0.5, "rows": 1.5, "tokens": 7.5}
    assert measured.eta(5) == 10


def test_validations_are_timed_apart_from_steps_and_counted(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(throughput.time, "monotonic", lambda: now[0])
    measured = Throughput()
    measured.validation_begins()
    now[0] = 30.0
    measured.validation_ends(whole=False)
    # Two seconds a step, and a validation of a minute between.
    for step in (0, 1):
        measured.step(step)
        now[0] += 2.0
    # As long as no whole validation was timed, none is counted.
    assert measured.eta(10, 3) == 20
    measured.step(2)
    measured.validation_begins()
    now[0] += 60.0
    measured.validation_ends()
    now[0] += 2.0
    measured.step(3)
    assert measured.rates()["steps"] == 0.5
    assert measured.eta(10, 3) == 20 + 3 * 60
    # In the middle of the next one, what is left of it counts.
    measured.validation_begins()
    now[0] += 15.0
    assert measured.eta(10, 2) == 20 + 2 * 60 + 45
    now[0] += 600.0
    assert measured.eta(10, 2) == 20 + 2 * 60
