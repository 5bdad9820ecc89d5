"""Rewards: those that are built in, those by path, and what functions may return."""

import math
import textwrap

import pytest

from lightning_peft.errors import ConfigError
from lightning_peft.tasks.reward_functions import (
    check_columns,
    json_exactness,
    judge,
    load_rewards,
    word_overlap,
)

ROWS = [
    {"prompt": "a", "row": 7, "columns": {"expected": "x"}},
    {"prompt": "b", "row": 9, "columns": {"expected": "y", "size": 3}},
]


@pytest.mark.parametrize(
    ("text", "expected", "reward"),
    [
        ('{"a": 1, "b": "x"}', '{"b": "x", "a": 1}', 1.0),
        ('{"a": 1, "b": "y"}', '{"a": 1, "b": "x"}', 0.2 + 0.3 + 0.25),
        ('{"a": 1}', {"a": 1, "b": "x"}, 0.2 + 0.15 + 0.25),
        ('{"a": 1, "c": 2}', {"a": 1, "b": 2}, 0.2 + (0.3 + 0.5) / 3),
        ("{}", {"a": 1}, 0.2),
        ("[1]", {"a": 1}, 0.2),
        ("[1, 2]", "[1, 2]", 1.0),
        ("1", "true", 0.2),
        ("1.0", "1", 1.0),
        ('{"a": true}', '{"a": 1}', 0.2 + 0.3),
        ('[{"a": [1]}]', [{"a": [True]}], 0.2),
        ("NaN", "NaN", 0.0),
        ("[" * 900 + "]" * 900, "[" * 900 + "]" * 900, 1.0),
        ("1", "[" * 100_000, 0.2),
        ('Here: {"a": 1}', {"a": 1}, 0.0),
        ("", {"a": 1}, 0.0),
    ],
)
def test_json_exactness(text, expected, reward):
    assert json_exactness([text], [expected]) == pytest.approx([reward])
    turns = [{"role": "assistant", "content": text}]
    assert json_exactness([turns], [expected], other=[1]) == pytest.approx([reward])


def test_word_overlap():
    found = word_overlap(["Open the file.", "open open", "", "no"], ["open a file"] * 4)
    assert found == pytest.approx([4 / 6, 2 / 5, 0.0, 0.0])


def test_paths_that_name_no_function():
    with pytest.raises(ConfigError) as caught:
        load_rewards(["nowhere.reward", "math.nothing", "math.pi", "reward", "json_exactness"])
    message = str(caught.value)
    assert "'nowhere.reward' cannot be imported: No module named 'nowhere'" in message
    assert "'math.nothing' cannot be imported" in message
    assert "'math.pi' is float, not a function" in message
    assert "'reward' cannot be imported" in message
    assert "or one of json_exactness, word_overlap" in message
    assert load_rewards(["textwrap.fill"]) == {"textwrap.fill": textwrap.fill}


@pytest.mark.parametrize("path", ["operator.add", "builtins.max"])
def test_functions_that_take_no_names_are_refused(path):
    with pytest.raises(ConfigError, match=f"'{path}' takes no arguments by name"):
        load_rewards([path])


def test_functions_get_lists_and_the_columns_by_name():
    seen = []

    def own(prompts, completions, size, **rest):
        seen.append((prompts, completions, size, rest))
        return [1, None]

    def narrow(completions, expected):
        return [len(one) / 2 for one in expected]

    found = judge({"own": own, "narrow": narrow}, ROWS, ["p", "qq"], [[1], [2, 3]])
    assert seen == [
        (
            ["a", "b"],
            ["p", "qq"],
            [None, 3],
            {"expected": ["x", "y"], "completion_ids": [[1], [2, 3]]},
        )
    ]
    assert found[0].tolist() == [1.0, 0.5]
    assert math.isnan(found[1, 0])
    assert found[1, 1] == 0.5


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ([0.5, math.nan], "'mine.own' returned nan for row 9, whose answer is 'qq'"),
        ([math.inf, 0.5], "'mine.own' returned inf for row 7"),
        ([0.5, "much"], "'mine.own' returned 'much' for row 9"),
        ([0.5], "'mine.own' returned 1 values for 2 answers"),
        (None, "'mine.own' returned None, not a list"),
        (0.5, r"'mine.own' returned 0\.5, not a list"),
        ({"a": 1, "b": 2}, "'mine.own' returned {.*}, not a list"),
    ],
)
def test_rewards_that_are_not_numbers_are_refused_by_name_and_row(values, problem):
    with pytest.raises(ConfigError, match=problem):
        judge({"mine.own": lambda **given: values}, ROWS, ["p", "qq"], [[1], [2]])


@pytest.mark.parametrize(
    ("name", "expected"),
    [("word_overlap", 42), ("word_overlap", {"a": 1}), ("word_overlap", None)]
    + [("json_exactness", value) for value in (None, "{'a': 1}", '```json\n{"a": 1}\n```', "[1,]")],
)
def test_what_a_row_expects_is_checked_by_the_functions_of_the_package(name, expected):
    rows = [ROWS[0], {"prompt": "b", "row": 9, "columns": {"expected": expected}}]
    with pytest.raises(ConfigError, match=f"'{name}' cannot compare with row 9, whose column"):
        check_columns(load_rewards([name]), rows)
    rows[1] = {"prompt": "b", "row": 9, "columns": {}}
    with pytest.raises(ConfigError, match=f"'{name}' cannot .* row 9, .* holds None. It is to"):
        check_columns(load_rewards([name]), rows)


def test_columns_that_no_row_has_are_named_before_anything_is_judged():
    def needs(completions, gold, size, other=None):
        return [float(one is None) for one in size]

    def also(completion_ids, *, silver, **rest):
        return [0.0 for _ in completion_ids]

    functions = {"mine.needs": needs, "mine.also": also, "json_exactness": json_exactness}
    problem = "reward 'mine.needs' needs gold, and 'mine.also' needs silver, and no row has such"
    with pytest.raises(ConfigError, match=problem):
        check_columns(functions, ROWS)
    both = {"gold": 1, "silver": None, "expected": "z"}
    check_columns(functions, [*ROWS, {"row": 10, "columns": both}])
    # A batch may have none of the rows that have a column.
    assert judge({"mine.needs": needs}, ROWS[:1], ["p"], [[1]]).tolist() == [[1.0]]
