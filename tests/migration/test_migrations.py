"""The pairs of docs/migrations: what is found in each, and that nothing is lost by the change."""

import json

import pytest

from lightning_peft.migration.scan import scan
from tools.migrations import KINDS, PAGE, RECORD, ROOT, lines_of_code, page_with, run

FOUND = {
    "multimodal": {
        *("peft-wrapping", "checkpoint-hook", "own-strategy", "strict-false"),
        "load-from-checkpoint",
    },
    "protein": {"peft-wrapping", "own-strategy", "strict-false", "load-from-checkpoint"},
    "encoder": {"peft-wrapping", "qkv-split", "rewritten-encoder-layer", "load-from-checkpoint"},
    "remote_sensing": {"peft-wrapping", "optimizer", "qkv-split", "load-from-checkpoint"},
    "retrieval": {"peft-wrapping", "peft-path", "load-from-checkpoint"},
    "speech": {"peft-wrapping", "adapter-loading", "checkpoint-callback", "merge"},
}
# Adapters start from other random numbers, and a fused layer has another adapter than its slices.
TOLERANCE = 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_migrate_finds_what_is_there(kind):
    assert {one.rule for one in scan(ROOT / kind / "before.py").findings} == FOUND[kind]
    assert scan(ROOT / kind / "after.py").findings == []


@pytest.mark.parametrize(
    "kind", [k if k == "encoder" else pytest.param(k, marks=pytest.mark.long) for k in KINDS]
)
def test_the_loss_is_the_same_or_better_with_less_code(kind):
    before, after = run(kind, "before"), run(kind, "after")
    assert after["loss"] <= before["loss"] * (1 + TOLERANCE)
    assert after["lines"] < before["lines"]
    record = json.loads(RECORD.read_text(encoding="utf-8"))[kind]
    for side, result in (("before", before), ("after", after)):
        # On another machine sums are in another order.
        assert result["loss"] == pytest.approx(record[side]["loss"], rel=TOLERANCE)
        assert result["bytes"] == pytest.approx(record[side]["bytes"], rel=TOLERANCE)


def test_the_page_has_the_record():
    results = json.loads(RECORD.read_text(encoding="utf-8"))
    assert list(results) == list(KINDS)
    assert page_with(results) == PAGE.read_text(encoding="utf-8")
    for kind, sides in results.items():
        assert sides["after"]["loss"] <= sides["before"]["loss"] * (1 + TOLERANCE)
        for side, result in sides.items():
            assert result["lines"] == lines_of_code(ROOT / kind / f"{side}.py")
