"""Reading a run while it is written: numbers, curves, logs, and why it failed."""

from __future__ import annotations

import json
import math
import re

import pytest

from gradio_app.chat.prompts import HeldOutPrompt
from gradio_app.pages.run import live_html
from gradio_app.pages.run.evaluation_html import evaluation
from gradio_app.pages.run.live_html import prompt_turns, samples
from gradio_app.pages.run.recipe import data_facts
from gradio_app.runs.curves import downsample, relative_increase, smooth, trend
from gradio_app.runs.failures import find_failure, report
from gradio_app.runs.files import cached_text, read_json_object, read_rows, remove_noise, tail
from gradio_app.runs.formatting import (
    format_bytes,
    format_count,
    format_duration,
    format_number,
    metric,
    time_ago,
)
from gradio_app.runs.health import HealthMonitor, HealthWarning
from gradio_app.runs.machine import Machine, parse_nvidia_smi
from gradio_app.runs.metrics import MAX_POINTS, Metrics, metrics_of
from gradio_app.runs.store import RunStore
from gradio_app.texts import LANGUAGES, Texts
from lightning_peft.runs.alerts import training_alert, validation_alert
from lightning_peft.runs.status import write_json
from tests.app.runs import recipe, settings
from tests.app.test_store import written


def line(step, **values):
    return json.dumps({"step": step, "epoch": 0, "time": 1.0, **values}) + "\n"


def append(file, text):
    with file.open("a") as opened:
        opened.write(text)


def test_only_what_is_new_is_read_and_no_half_lines(tmp_path):
    file = tmp_path / "metrics.jsonl"
    metrics = Metrics(file)
    assert metrics.refresh().curve("train_loss") == []
    append(file, line(1, train_loss=2.0) + line(1, val_loss=3.0) + '{"step": 2, "train')
    assert metrics.refresh().curve("train_loss") == [(1, 2.0)]
    append(file, '_loss": 1.5}\n' + "no json\n[1]\n" + line("x", train_loss=9.0))
    assert metrics.refresh().curve("train_loss") == [(1, 2.0), (2, 1.5)]
    assert metrics.curve("val_loss") == [(1, 3.0)]


def test_the_last_line_of_a_step_counts_and_what_was_given_up_goes(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = [line(step, train_loss=float(step)) for step in range(1, 6)]
    append(file, "".join(rows) + line(5, val_loss=5.0))
    metrics = Metrics(file).refresh()
    append(file, line(3, train_loss=30.0) + line(4, train_loss=40.0))
    metrics.refresh()
    assert metrics.curve("train_loss") == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0)]
    assert metrics.curve("val_loss") == []


def test_a_file_that_is_replaced_is_read_anew(tmp_path):
    file = tmp_path / "metrics.jsonl"
    append(file, line(1, train_loss=2.0) + line(2, train_loss=1.0))
    metrics = Metrics(file).refresh()
    (tmp_path / "other").write_text(line(7, train_loss=0.5))
    (tmp_path / "other").replace(file)
    assert metrics.refresh().curve("train_loss") == [(7, 0.5)]
    file.unlink()
    assert metrics.refresh().curve("train_loss") == []


def test_long_runs_take_bounded_memory_and_keep_their_peaks(tmp_path):
    file = tmp_path / "metrics.jsonl"
    peak = 9_000
    rows = [line(step, train_loss=99.0 if step == peak else 1.0) for step in range(20_000)]
    append(file, "".join(rows))
    points = Metrics(file).refresh().curve("train_loss")
    assert len(points) <= MAX_POINTS
    assert (peak, 99.0) in points
    assert metrics_of(file) is metrics_of(file)


@pytest.mark.parametrize("count", [3, 500, 501, 1_234])
def test_thinning_keeps_ends_extremes_and_order(count):
    points = [
        (step, math.sin(step / 40) + (5 if step == count // 3 else 0)) for step in range(count)
    ]
    drawn = downsample(points, 500)
    assert len(drawn) <= 500
    assert (drawn[0], drawn[-1]) == (points[0], points[-1])
    assert max(drawn, key=lambda p: p[1]) == max(points, key=lambda p: p[1])
    assert drawn == sorted(set(drawn))
    assert set(drawn) <= set(points)


def test_smoothing_is_the_corrected_moving_average():
    points = [(1, 4.0), (2, 2.0), (3, float("nan")), (4, 0.0)]
    # By hand: 0.5*4/(1-0.5); (0.25*4+0.5*2)/(1-0.25); the same; (1*0.5+0)/(1-0.125)
    values = [value for _, value in smooth(points, 0.5)]
    assert values == pytest.approx([4.0, 2 / 0.75, 2 / 0.75, 1 / 0.875])
    assert smooth(points[:2], 0.0) == points[:2]


def test_a_trend_is_said_of_enough_points_and_not_of_noise():
    assert trend([(s, 3.0 - s / 10) for s in range(20)]) == -1
    assert trend([(s, 1.0 + s) for s in range(20)]) == 1
    assert trend([(s, 1.0) for s in range(20)]) == 0
    assert trend([(s, 3.0 - s / 10) for s in range(19)]) is None
    # A fall from 3.1 whose last batch is a hard one, and one that has settled.
    assert trend([*((s, 3.1 - s / 20) for s in range(39)), (39, 1.6)]) == -1
    assert trend([(s, 1.0 + 0.3 * (s % 3)) for s in range(40)]) == 0
    # From 3 to 9, and then a little down: lately it falls, and it is far above its start.
    ruined = [(s, min(3.0 + s, 9.0) - s / 50) for s in range(40)]
    assert trend(ruined) == -1
    first, last = relative_increase(ruined)
    assert (round(first, 1), round(last, 1)) == (6.8, 8.3)
    assert relative_increase([(s, 3.0 - s / 10) for s in range(20)]) is None
    assert relative_increase(ruined[:19]) is None


def test_the_tail_of_a_log_is_short_plain_and_without_secrets(tmp_path):
    file = tmp_path / "train.log"
    long = "".join(f"line {n}\n" for n in range(30_000))
    file.write_text(long + "\x1b[31mred\x1b[0m 1%\r50%\r100%\n\x07token=abc hf_abcdefghijkl\nlast")
    lines = tail(file, 200).split("\n")
    assert len(lines) == 200
    assert lines[-3:] == ["100%", "token=[hidden] [hidden]", "last"]
    assert tail(tmp_path / "none") == ""


def test_rows_and_objects_of_strange_files(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n[2]\nx\n{"a": 3}\n{"a": 4')
    assert [row["a"] for row in read_rows(file)] == [1, 3]
    assert [row["a"] for row in read_rows(file, most_bytes=20)] == [3]
    assert read_json_object(file) == {}
    assert list(read_rows(tmp_path / "none")) == []


def test_small_files_are_read_again_when_they_have_changed(tmp_path):
    file = tmp_path / "a"
    assert cached_text(file) is None
    file.write_text("one")
    assert cached_text(file) == "one"
    file.write_text("two!")
    assert cached_text(file) == "two!"


FAILURES = {
    "gpu_memory": ("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB"),
    "memory": ("RuntimeError", "[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    "disk": ("OSError", "[Errno 28] No space left on device"),
    "gated": ("OSError", "You are trying to access a gated repo."),
    "offline": ("OSError", "We couldn't connect to 'https://huggingface.co'"),
    "rows": ("ConfigError", "2 problems: row 3 has no completion"),
    "explained": ("ConfigError", "learning_rate=-1 is negative"),
    "other": ("KeyError", "'messages'"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_failures_are_reported_apart(tmp_path, kind):
    store = RunStore(settings(tmp_path))
    run = store.create("local", recipe(), "a")
    written(run.folder.path, state="failed")
    error, message = FAILURES[kind]
    secret = f"{message} hf_abcdefghijkl"
    content = {"error": error, "message": secret, "traceback": ["Traceback\n", f"{secret}\n"]}
    write_json(run.folder.error, content)
    failure = find_failure(store.get("local", run.id))
    assert failure.kind == kind
    assert message in failure.message
    assert "hf_" not in failure.message + failure.details + report(run)
    assert "fake:" in report(run)
    for language in LANGUAGES:
        t = Texts(language)
        assert t.has(f"run.why_{kind}")
        assert t.has(f"run.todo_{kind}")


def test_a_start_that_failed_is_reported_by_what_it_printed(tmp_path):
    store = RunStore(settings(tmp_path))
    run = store.update_metadata(store.create("local", recipe(), "a"), launched=1.0)
    (run.folder.path / "start.log").write_text("noise\nlightning-peft: 'x' is not a recipe.\n")
    failure = find_failure(run)
    assert (failure.kind, failure.message) == ("explained", "'x' is not a recipe.")


def test_a_process_that_was_killed(tmp_path):
    store = RunStore(settings(tmp_path))
    written(store.root / "a", pid=2**22 + 1)
    assert find_failure(store.get("local", "a")).kind == "killed"


def test_words():
    t = Texts()
    assert [format_duration(s, t) for s in (5.4, 90, 3_700, 90_000)] == [
        "5 s",
        "2 min",
        "1 h 1 min",
        "1 d 1 h",
    ]
    assert time_ago(100, t, now=110) == "just now"
    assert time_ago(100, t, now=400) == "5 min ago"
    assert [format_bytes(n, t) for n in (12, 991_117_312, 16e9)] == ["12 B", "991 MB", "16.0 GB"]
    assert [format_number(n, t) for n in (1.42345, 2e-4, 0.0)] == ["1.423", "2.0e-4", "0"]
    assert [format_count(n, t) for n in (2_100, 12.3, 1.25, 2e6)] == ["2.1k", "12", "1.2", "2.0M"]
    de = Texts("de")
    assert [format_bytes(16e9, de), format_number(1.42345, de), format_count(2_100, de)] == [
        "16,0 GB",
        "1,423",
        "2,1k",
    ]
    assert [metric(name, de) for name in ("val_token_accuracy", "val_perplexity")] == [
        "Token-Genauigkeit",
        "Perplexität",
    ]
    assert metric("val_my_own", de) == "My own"


def test_what_fits_on_a_machine():
    card = Machine("NVIDIA RTX 4090", 24 * 10**9, 64 * 10**9, 32 * 10**9, 16)
    assert (card.max_billions(quantized=False), card.max_billions(quantized=True)) == (8, 14)
    laptop = Machine(None, 0, 16 * 10**9, 8 * 10**9, 4)
    assert laptop.max_billions(quantized=True) == 0.5
    assert parse_nvidia_smi("NVIDIA H200, 143771\nNVIDIA H200, 143771\n") == (
        "NVIDIA H200",
        143771 * 2**20,
    )
    assert parse_nvidia_smi("NVIDIA X, [N/A]") == ("NVIDIA X", 0)
    assert parse_nvidia_smi("") is None


def test_a_run_without_steps_is_reported(tmp_path):
    store, clock = RunStore(settings(tmp_path)), [0.0]
    watch = HealthMonitor(now=lambda: clock[0])

    def kinds(**changes):
        written(store.root / "a", phase="training", steps_per_second=0.05, **changes)
        found = watch.warnings(store.get("local", "a"))
        return [one.kind for one in found if one.kind == "stuck"]

    assert kinds(step=3) == []
    clock[0] = 99.0
    # A step of twenty seconds has five times as long.
    assert kinds(step=3) == []
    clock[0] = 101.0
    assert kinds(step=3) == ["stuck"]
    assert kinds(step=4) == []
    clock[0] = 900.0
    assert kinds(step=4, state="finished") == []


def test_the_numbers_of_a_run_in_words(tmp_path):
    file = tmp_path / "metrics.jsonl"
    append(file, line(0, val_loss=3.0) + line(1, train_loss=float("nan"), tokens_per_second=2_100))
    append(file, line(2, val_loss=1.0, val_token_accuracy=0.75) + line(4, val_loss=2.0))
    metrics, t = Metrics(file).refresh(), Texts()
    shown = live_html.numbers(metrics, t)
    for text in ("no number", "best 1 at step 2", "2.1k", "Token accuracy", "0.75"):
        assert text in shown
    assert "lowest 1 at step 2" in live_html.summary(metrics, t)
    assert '<th scope="row">4</th>' in live_html.curve_table(metrics, t)
    warned = [
        HealthWarning("stuck", 120),
        HealthWarning("disk", 10**9),
        HealthWarning("memory", 97),
    ]
    for language in LANGUAGES:
        assert live_html.alerts([{"kind": "nan"}], warned, Texts(language)).count("<strong>") == 4


def test_alerts_are_reported_in_the_language_of_the_page():
    found = [
        training_alert([2.0, math.inf]),
        training_alert([1.0] * 10 + [1.6] * 10),
        validation_alert([math.nan]),
        validation_alert([0.9, 1.0, 1.125]),
    ]
    rows = [
        {"step": 3, "kind": one.kind, "text": one.text, "alert": dict(one.seen)} for one in found
    ]
    # What a trainer writes is read as JSON again.
    rows = json.loads(json.dumps(rows))
    german = live_html.alerts(rows, [], Texts("de"))
    for text in (
        "Der Trainingsverlust ist NaN oder unendlich",
        "von 1 auf 1,6",
        "Der Validierungsverlust",
    ):
        assert text in german
    assert "2-mal in Folge gestiegen, von 0,9 auf 1,125" in german
    assert "2 times in a row, from 0.9 to 1.125" in live_html.alerts(rows, [], Texts())
    for text in ("learning rate", "The training", "risen"):
        assert text not in german
    # One that this page does not know, and what older or broken runs have written.
    unknown = {"kind": "cold", "text": "It is <b>cold</b>.", "alert": {"of": 3}}
    shown = live_html.alerts([unknown], [], Texts("de"))
    assert "It is &lt;b&gt;cold" in shown
    assert 'href="' not in shown
    for seen in (None, [], {}, {"of": "x", "first": "y"}):
        old = [{"kind": kind, "text": "old", "alert": seen} for kind in live_html.ALERTS]
        assert "old" not in live_html.alerts(old, [], Texts())
    assert live_html.alerts([{"kind": "started", "text": "Training starts."}], [], Texts()) == ""


def test_the_newest_benchmarks_of_a_run_are_a_table(tmp_path):
    store = RunStore(settings(tmp_path))
    written(store.root / "a", step=1)
    run = store.get("local", "a")
    assert evaluation(run, Texts()) == ""
    value, change = {"value": 0.25, "stderr": 0.0625}, {"value": 0.5, "stderr": None}
    row = {"task": "dates<", "metric": "ppl", "filter": "strict", "higher_is_better": False}
    row |= {"values": {"base": value, "mine": value}, "differences": {"mine": change}}
    report = {"compared": ["base", "mine"], "results": [row], "harness": {"version": "9.1"}}
    report["evaluated"] = "2026-11-29T10:00:00+00:00"
    run.folder.evaluations.mkdir()
    write_json(run.folder.evaluations / "1.json", report | {"harness": {"version": "old"}})
    write_json(run.folder.evaluations / "2.json", report)
    shown = evaluation(run, Texts())
    for text in ("dates&lt;: ppl (strict), lower is better", "mine − base", ">0.2500 ± 0.0625<"):
        assert text in shown
    assert ">+0.5000<" in shown
    assert "lm-evaluation-harness 9.1, 2026-11-29." in shown
    german = evaluation(run, Texts("de"))
    assert "kleiner ist besser" in german
    assert ">0,2500 ± 0,0625<" in german
    (run.folder.evaluations / "3.json").write_text('{"compared": [1], "results": [{}, 2]}')
    assert "None: None" in evaluation(run, Texts())
    (run.folder.evaluations / "3.json").write_text("[")
    assert evaluation(run, Texts()) == ""


def test_samples_are_those_of_few_steps_and_escaped():
    rows = [
        {"step": step, "sample": 0, "prompt": "<i>", "expected": "e", "generated": f"<{step}>"}
        for step in range(0, 100, 10)
    ]
    shown = samples([*rows, {"step": "x", "sample": 0}], [], Texts())
    assert shown.count("<td ") == 5
    assert "&lt;i&gt;" in shown
    assert "&lt;90&gt;" in shown
    assert "LogSamples" in samples([], [], Texts())
    many = [{**rows[0], "sample": place} for place in range(5)]
    assert ("<details" in shown, samples(many, [], Texts()).count("(2)")) == (False, 2)


def test_samples_say_who_spoke_what_was_cut_and_what_is_as_expected():
    given = {"prompt": "system\nBe <b>\nuser\nWhy?\nassistant\n", "expected": "It is so "}
    said = ("It was so", "It  is so", "No")
    rows = [
        {"step": step, "sample": 0, **given, "generated": text, "cut": step == 2}
        for step, text in enumerate(said)
    ]
    known = [
        HeldOutPrompt("Why?", "other"),
        HeldOutPrompt("Why?", "It is so", (("system", "Be <b>", ()),)),
    ]
    shown = samples(rows, known, Texts())
    assert '<span class="role">System</span> Be &lt;b&gt;</div>' in shown
    assert '<span class="role">User</span> Why?</div>' in shown
    assert "assistant" not in shown
    assert "It <mark>was</mark> so" in shown
    counts = re.findall(r"(\d) of 1 as expected", shown)
    assert counts == ["0", "1", "0"]
    assert shown.count("\u2713") == 1
    # The last one shares no word with what was expected: marks would say nothing.
    assert '<td data-label="Step 2">No <span class="cut">cut</span></td>' in shown
    assert "Why?\nassistant" in samples(rows, known[:1], Texts())


def test_json_is_as_expected_in_any_order_and_all_samples_are_counted():
    given = {"prompt": "p", "expected": '{"a": 1, "b": [2]}'}
    right, wrong = '{"b":[2],"a":1}', '{"b":[2],"a":2}'
    rows = [
        {"step": 1, "sample": place, **given, "generated": wrong if place == 3 else right}
        for place in range(16)
    ]
    shown = samples(rows, [], Texts())
    assert "15 of 16 as expected" in shown
    assert shown.count("\u2713") == 11


def test_of_json_without_spaces_only_what_differs_is_marked():
    texts = {name: f'{{"items":{{"knives":4,"{name}":7}}}}' for name in ("mugs", "chairs")}
    row = {"step": 1, "sample": 0, "expected": texts["mugs"], "generated": texts["chairs"]}
    shown = samples([row], [], Texts())
    assert re.findall("<mark>(.*?)</mark>", shown) == ["chairs"]


@pytest.mark.parametrize(
    ("said", "expected", "marked"),
    [
        # A sign or space that both have must not keep words from being paired.
        ("It's Berlin", "Berlin is big", ["It's"]),
        ("Berlin is big", "It's Berlin", ["is", "big"]),
        ('{"a": 1, "b": 2}', '{"a": 1, "b": 3}', ["2"]),
        # Of what is expected, only what is shown is compared.
        ("a word", f"a {'x ' * 200} word", ["word"]),
    ],
)
def test_words_that_are_not_expected_are_marked(said, expected, marked):
    words = live_html.answer_cell({"generated": said, "expected": expected})["words"]
    assert "".join(text for text, _ in words) == said
    assert [text for text, different in words if different] == marked


def test_texts_that_repeat_themselves_are_not_compared(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("would take minutes")

    monkeypatch.setattr(live_html, "SequenceMatcher", refuse)
    for said, expected in (("a," * 200, ", b" * 3000), ("a," * 200, "a " * 200)):
        cell = live_html.answer_cell({"generated": said, "expected": expected})
        assert cell["words"] == [(said, False)]


def test_the_turns_of_a_prompt_are_those_of_its_row():
    system = ("system", "Be kind", ())
    earlier = (system, ("user", "Bye", ()), ("assistant", "See you", ()))
    known = [
        HeldOutPrompt("Hello", "x", ()),
        HeldOutPrompt("Say Hello", "x", (system,)),
        HeldOutPrompt("Hello", "x", earlier),
    ]

    def turns(*said):
        return prompt_turns("\n".join(said), "x", known)

    assert turns("user", "Hello") == [("user", "Hello")]
    wanted = [("system", "Be kind"), ("user", "Say Hello")]
    assert turns("Be kind", "user", "Say Hello") == wanted
    spoken = [(role, text) for role, text, _ in earlier]
    assert turns("Be kind", "Bye", "See you", "user", "Hello") == [*spoken, ("user", "Hello")]
    assert turns("Other") == [(None, "Other")]


def test_provenance_of_data_is_put_into_words():
    splits = {"train": {"rows": 1200, "tokens": 5}, "validation": {"rows": 90}, "test": {"rows": 0}}
    record = {"class": "mine.Data", "data": "orders.csv", "shape": "prompt_completion"}
    counts = {"key": "d51b", "rows": 1300, "rejected": 10, "splits": splits}
    assert data_facts({**record, **counts}, Texts("de")) == (
        "orders.csv, Prompt und Antwort, Trainingszeilen: 1.200, Validierungszeilen: 90, "
        "übersprungen: 10 von 1.300"
    )
    assert data_facts({"class": "mine.Data"}, Texts()) == "mine.Data"
    assert data_facts(None, Texts()) == data_facts({}, Texts()) == ""


def test_a_log_is_shown_without_adverts_and_bars():
    log = (
        "trainable 315,392 of 4,577,536 parameters\n"
        "\U0001f4a1 Tip: try installing [litlogger](https://pypi.org/project/litlogger/)\n"
        "Failed to load CPU gemm_4bit_forward from kernels-community: No module named 'kernels'.\n"
        "Loading weights: 100%|\u2588\u2588| 38/38 [00:00<00:00, 1033.70it/s]\n"
        "Preparing rows.jsonl:  61%|###   | 1.2k/2.0k [00:01<00:00]\n"
        "the loss fell by 12% | as logged\nValueError: 100%"
    )
    assert remove_noise(log).split("\n") == [
        "trainable 315,392 of 4,577,536 parameters",
        "the loss fell by 12% | as logged",
        "ValueError: 100%",
    ]
