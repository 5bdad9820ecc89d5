"""Curves as they are drawn, and what is said of a run: worse than its base, how far, how long."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html import unescape

import pytest

from gradio_app.pages.plot import Axis, Series, curve_table, linear, logarithmic, plot
from gradio_app.pages.run import live_html
from gradio_app.pages.run_state import phase_progress, time_left
from gradio_app.runs.loss_increase import find_loss_increase, finished_worse
from gradio_app.runs.metrics import Metrics
from gradio_app.runs.outcomes import outcome_of
from gradio_app.runs.store import RunStore
from gradio_app.texts import Texts
from tests.app.runs import recipe, settings

TITLES = {"x_title": "Step", "y_title": "Loss", "empty": "nothing yet"}


def ticks(html, axis):
    return [float(one) for one in re.findall(rf'class="{axis}-tick"[^>]*>([^<]+)<', html)]


def test_axes_have_round_numbers_and_steps_are_whole():
    assert linear([0.83, 1.61]).ticks == pytest.approx((0.8, 1.0, 1.2, 1.4, 1.6, 1.8))
    assert linear([1, 12], whole=True).ticks == (2, 4, 6, 8, 10, 12)
    assert linear([0, 1], whole=True).ticks == (0, 1)
    assert linear([3, 3], whole=True).ticks == (2, 3, 4)
    one = linear([0.5])
    assert one.low < 0.5 < one.high
    assert linear([0.0]).place(0.0) == 0.5 or linear([0.0]).low == 0.0
    assert linear([-2.0, 2.0]).place(0.0) == 0.5


def test_a_logarithmic_axis_is_one():
    axis = logarithmic([0.8, 130.0])
    assert axis.ticks == pytest.approx((0.5, 1, 2, 5, 10, 20, 50, 100, 200))
    tenfold = axis.place(10) - axis.place(1)
    assert tenfold == pytest.approx(axis.place(100) - axis.place(10))
    assert (axis.place(axis.low), axis.place(axis.high)) == (0, 1)
    assert logarithmic([1e-6, 1.0]).ticks == pytest.approx([10.0**n for n in range(-6, 1)])
    assert logarithmic([2.0, 2.0]).ticks == (2.0, 5.0)
    assert isinstance(logarithmic([3e-8, 4e-8]), Axis)


def test_rows_of_a_short_run_have_different_times():
    shown = curve_table({"a": [(0.0061, 2.0), (0.0142, 1.0), (12345.0, 0.5)]}, "h", Texts())
    assert re.findall(r'scope="row">([^<]+)<', shown) == ["0.0061", "0.0142", "12345"]


def test_a_plot_shows_numbers_its_only_point_and_no_html_of_a_run():
    t = Texts()
    assert plot([], t, **TITLES) == '<p class="plot empty">nothing yet</p>'
    hostile = "<script>x</script>"
    shown = plot([Series(hostile, "#123456", [(4, 1.5)])], t, **TITLES)
    assert "<script>" not in shown
    assert 'd="M500 500h0"' in shown
    assert ticks(shown, "x") == [3, 4, 5]
    points = json.loads(unescape(re.search('data-points="([^"]+)"', shown)[1]))
    assert points[0][0] == 0.5
    two = [Series("training", "#111111", [(1, 10.0), (2, -1.0), (3, 0.1)])]
    shown = plot(two, t, log_y=True, **TITLES)
    assert ticks(shown, "y") == [0.1, 0.2, 0.5, 1, 2, 5, 10]
    # What has no logarithm is left out; the rest is at the ends of both axes.
    assert 'd="M0 0L1000 1000"' in shown
    assert ticks(plot(two, t, **TITLES), "y") == [-2, 0, 2, 4, 6, 8, 10]


@pytest.fixture
def run(tmp_path):
    return RunStore(settings(tmp_path)).create("local", recipe(), "a run")


def numbers_of(run, losses, validations=(), rate=2e-4):
    rows = [{"step": s, "train_loss": x, "learning_rate": rate} for s, x in enumerate(losses, 1)]
    rows += [{"step": s, "val_loss": x} for s, x in validations]
    for row in sorted(rows, key=lambda row: row["step"]):
        run.folder.append(run.folder.metrics, row)
    return Metrics(run.folder.metrics).refresh()


def test_a_ruined_run_is_seen_against_its_start(run):
    """Its last losses fall, and are three times what the base had."""
    metrics = numbers_of(run, [3.4, 9.5, 9.2, 8.98], [(0, 3.13), (4, 9.32)], rate=1.0)
    found = find_loss_increase(run, metrics)
    assert (found.metric, found.before, found.after) == ("val_loss", 3.13, 9.32)
    assert found.rate == 1.0
    # Too few points for a trend: where it began is said instead.
    assert "8.98" in live_html.numbers(metrics, Texts())
    assert "falling" not in live_html.numbers(metrics, Texts())
    assert "3.4 at step 1" in live_html.numbers(metrics, Texts())
    assert not finished_worse(run)
    run.folder.write(run.folder.result, {"before": {"val_loss": 3.13}, "after": {"val_loss": 0.7}})
    assert find_loss_increase(run, metrics) is None
    nan = {"before": {"val_loss": 3.13}, "after": {"val_loss": math.nan}}
    run.folder.write(run.folder.result, nan)
    assert math.isnan(find_loss_increase(run, metrics).after)


def test_without_validation_the_training_loss_says_it(run):
    good = numbers_of(run, [3.0 - 0.05 * n for n in range(40)])
    assert find_loss_increase(run, good) is None
    assert "falling" in live_html.numbers(good, Texts())
    run.folder.metrics.unlink()
    bad = numbers_of(run, [min(3.0 + n, 9.0) - n / 50 for n in range(40)])
    assert find_loss_increase(run, bad).metric == "train_loss"
    for language, words in (("en", "above its start"), ("de", "über dem Anfang")):
        assert words in live_html.numbers(bad, Texts(language))
        assert words in live_html.summary(bad, Texts(language))


def at_work(run, **status):
    known = {"state": "running", "phase": "validating", "step": 4, "total_steps": 9, **status}
    return replace(run, status=replace(run.status, **known))


def test_time_goes_on_between_two_reports_and_a_validation_says_its_row(run):
    t = Texts()
    busy = at_work(run, eta_seconds=130.0, eta_at=1_000.0, updated=1_060.0)
    assert [time_left(busy, t, now) for now in (1_000, 1_100, 1_131)] == [
        "2 min left",
        "30 s left",
        "",
    ]
    rows = {"unit": "rows", "done": 8, "of": 17}
    busy = at_work(run, part=rows)
    assert phase_progress(busy, t) == ("row 9 of 17", 47)
    assert phase_progress(busy, Texts("de"))[0] == "Zeile 9 von 17"
    assert phase_progress(at_work(run, part={**rows, "done": 17}), t) == ("row 17 of 17", 100)
    assert phase_progress(at_work(run, part={**rows, "unit": "samples"}), t)[0] == "sample 9 of 17"
    for strange in (None, [], {}, {**rows, "of": None}, {**rows, "unit": "<b>"}, {**rows, "of": 0}):
        assert phase_progress(at_work(run, part=strange), t) == ("", None)
    assert phase_progress(at_work(run, part=rows, state="stopped"), t) == ("", None)


def test_memory_and_time_are_of_all_sessions(run):
    for step, most in ((1, 2_600_000_000), (2, 2_300_000_000)):
        run.folder.append(run.folder.metrics, {"step": step, "peak_process_bytes": most})
    metrics = Metrics(run.folder.metrics).refresh()
    assert "2.6 GB" in live_html.numbers(metrics, Texts())
    twice = at_work(run, started=100.0, updated=160.0, earlier_seconds=400.0)
    outcome = outcome_of(twice, metrics)
    assert (outcome.seconds, outcome.memory) == (460.0, 2_600_000_000)
