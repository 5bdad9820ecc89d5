"""Answers that are kept: one for each question, the good ones alone, for some minutes."""

from __future__ import annotations

import threading

import pytest

from gradio_app.pages.new.data_check import is_bundled
from gradio_app.recipe import answer_cache
from gradio_app.recipe.answer_cache import MAX_ANSWERS, AnswerCache, file_stamps
from gradio_app.recipe.content import with_value
from gradio_app.recipe.edits import base_recipe


def test_a_question_is_answered_once_and_only_good_answers_are_kept(monkeypatch):
    cache, asked = AnswerCache(), []

    def find(answer):
        return lambda needed: asked.append(answer) or answer

    assert cache.ask("a", find("bad"), lambda one: one != "bad") == "bad"
    assert cache.ask("a", find("good"), lambda one: one != "bad") == "good"
    assert cache.ask("a", find("other"), lambda one: True) == "good"
    assert cache.ask("b", find("other"), lambda one: True) == "other"
    assert asked == ["bad", "good", "other"]
    monkeypatch.setattr(answer_cache, "SECONDS", 0.0)
    assert cache.ask("a", find("newer"), lambda one: True) == "newer"


@pytest.mark.parametrize(("kept", "times"), [(True, 1), (False, 2)])
def test_pages_that_ask_the_same_wait_for_each_other(kept, times):
    cache, found, asked = AnswerCache(), [], []
    begun, end, polled = threading.Event(), threading.Event(), threading.Semaphore(0)

    def find(needed):
        asked.append(needed())
        begun.set()
        assert end.wait(10)
        return "answer"

    def needed():
        polled.release()
        return True

    def ask(needed):
        found.append(cache.ask("a", find, lambda one: kept, needed))

    pages = [threading.Thread(target=ask, args=[one]) for one in (lambda: True, needed)]
    pages[0].start()
    assert begun.wait(10)
    # A page that has left does not wait, and no page waits for another question.
    assert cache.ask("a", lambda needed: needed(), bool, lambda: False) is False
    assert cache.ask("b", lambda needed: needed(), bool) is True
    pages[1].start()
    # The second time while it waits.
    assert polled.acquire(timeout=10)
    assert polled.acquire(timeout=10)
    assert asked == [True]
    end.set()
    for page in pages:
        page.join(10)
    assert found == ["answer", "answer"]
    assert asked == [True] * times


def test_an_error_keeps_no_page_waiting():
    cache = AnswerCache()
    with pytest.raises(ZeroDivisionError):
        cache.ask("a", lambda needed: 1 // 0, bool)
    assert cache.ask("a", lambda needed: 1, bool) == 1


def test_the_oldest_answers_make_room():
    cache = AnswerCache()
    for number in range(MAX_ANSWERS + 1):
        cache.ask(number, lambda needed: "first", bool)
    again = [cache.ask(number, lambda needed: "again", bool) for number in (1, MAX_ANSWERS, 0)]
    assert again == ["first", "first", "again"]


@pytest.mark.parametrize(
    ("places", "shared"),
    [
        ({"data": "recipe:small/data/orders.jsonl"}, True),
        ({"data": "/uploads/v-a/20261126-00000000-rows.jsonl"}, False),
        ({"data": "upload:20261126-00000000-rows.jsonl"}, False),
        ({"data": "recipe:small/data/orders.jsonl", "validation_data": "/data/mine.csv"}, False),
        ({"data": "org/set"}, False),
        # A data module of one's own.
        ({"data": None}, False),
    ],
)
def test_only_data_of_the_package_is_shared_by_pages(places, shared):
    content = base_recipe("sft")
    for name, place in places.items():
        content = with_value(content, f"data.init_args.{name}", place)
    assert is_bundled(content) is shared


def test_a_file_that_was_edited_has_other_stamps(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert file_stamps(file) == []
    file.write_text("{}")
    before, folder = file_stamps(file), file_stamps(tmp_path)
    assert before == folder == file_stamps(file)
    file.write_text("{}\n")
    assert before != file_stamps(file) == file_stamps(tmp_path)
