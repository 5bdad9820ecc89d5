"""Answers that are kept: one for each question, the good ones alone, for some minutes."""

from __future__ import annotations

import threading

from gradio_app.recipe import answer_cache
from gradio_app.recipe.answer_cache import AnswerCache


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


def test_who_waits_for_a_turn_takes_the_answer_that_another_page_has_found():
    """As commands do: one at a time, and none that is not needed any more."""
    cache, turn, found = AnswerCache(), threading.Lock(), []
    begun, end = threading.Event(), threading.Event()

    def find(needed):
        with turn:
            if not needed():
                return None
            begun.set()
            assert end.wait(10)
            return "answer"

    pages = [
        threading.Thread(target=lambda: found.append(cache.ask("a", find, bool))) for _ in range(2)
    ]
    pages[0].start()
    assert begun.wait(10)
    pages[1].start()
    end.set()
    for page in pages:
        page.join(10)
    assert found == ["answer", "answer"]
    assert cache.ask("b", lambda needed: needed(), bool, still_needed=lambda: False) is False
