"""The table of results: values, standard errors, and differences of the same rows."""

import math

import pytest

from lightning_peft.evaluation.results import table_rows


def found(values, **more):
    """What the harness returns for one model that got ``values`` in a metric called acc."""
    mean = sum(values) / len(values)
    samples = [{"doc_id": k, "filter": "none", "acc": v} for k, v in enumerate(values)]
    metrics = {"name": "t", "sample_len": len(values), "acc,none": mean, "acc_stderr,none": 0.2}
    return {
        "results": {"t": metrics | more},
        "higher_is_better": {"t": {"acc": True, "bleu": True}},
        "samples": {"t": samples},
    }


def test_the_error_of_a_difference_is_that_of_the_rows_differences():
    before, after = [0, 0, 1, 1], [1, 0, 1, 1]
    (row,) = table_rows({"base": found(before), "a": found(after), "b": found(before)})
    assert row["values"]["a"] == {"value": 0.75, "stderr": 0.2}
    # Differences 1, 0, 0, 0: variance 0.25, of four rows.
    assert row["differences"]["a"] == {"value": 0.25, "stderr": math.sqrt(0.25 / 4)}
    assert row["differences"]["b"] == {"value": 0.0, "stderr": 0.0}
    assert (row["task"], row["metric"], row["filter"], row["samples"]) == ("t", "acc", "none", 4)
    assert row["higher_is_better"] is True


def test_what_is_not_a_mean_of_rows_has_no_error_of_its_difference():
    more = {"bleu,none": 31.5, "bleu_stderr,none": "N/A", "odd,none": math.nan}
    one, other = found([0, 1], **more), found([1, 1], **more | {"bleu,none": 33.0})
    rows = {row["metric"]: row for row in table_rows({"base": one, "a": other})}
    assert rows["bleu"]["values"]["base"] == {"value": 31.5, "stderr": None}
    assert rows["bleu"]["differences"]["a"] == {"value": 1.5, "stderr": None}
    assert rows["odd"]["differences"]["a"] == {"value": None, "stderr": None}


@pytest.mark.parametrize("change", [{"doc_id": 7}, {"acc": 0.5}, {"filter": "other"}])
def test_other_rows_are_not_paired(change):
    one, other = found([0, 1]), found([1, 1])
    other["samples"]["t"][1] |= change
    (row,) = table_rows({"base": one, "a": other})
    assert row["differences"]["a"] == {"value": 0.5, "stderr": None}
