"""The run of the first card: a small QLoRA run that comes with the package, without a network."""

from __future__ import annotations

import yaml

from gradio_app.recipe.content import merge_recipes
from lightning_peft.recipe_files import find_recipe, resolved

RECIPE = "sft-qlora"
SMALL = "small/sft"


def demo_recipe() -> str:
    """Returns the recipe as one YAML, as ``fit --config sft-qlora --config small/sft`` reads it."""
    below, above = (yaml.safe_load(resolved(find_recipe(name))) for name in (RECIPE, SMALL))
    text = yaml.safe_dump(merge_recipes(below, above), sort_keys=False, allow_unicode=True)
    return f"# The recipe {RECIPE} with {SMALL} laid over it.\n{text}"
