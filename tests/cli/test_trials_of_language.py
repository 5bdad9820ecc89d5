"""Recipes that train a language model to answer, in real processes."""

import pytest
from trials import check_trial, trials_of


@pytest.mark.parametrize("recipe", [*trials_of(__file__), "forkme"])
def test_a_recipe_trains_and_leaves_a_whole_run_folder(recipe, program, tmp_path):
    check_trial(recipe, program, tmp_path)
