"""The run of the first card: a small QLoRA run that comes with the package, without a network."""

from __future__ import annotations

from typing import Any

import yaml

from lightning_peft.cli.recipes import find_recipe, resolved

RECIPE = "sft-qlora"
SMALL = "small/sft"


def demo_recipe() -> str:
    """Returns the recipe as one YAML, as ``fit --config sft-qlora --config small/sft`` reads it."""
    below, above = (yaml.safe_load(resolved(find_recipe(name))) for name in (RECIPE, SMALL))
    text = yaml.safe_dump(laid_over(below, above), sort_keys=False, allow_unicode=True)
    return f"# The recipe {RECIPE} with {SMALL} laid over it.\n{text}"


def laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Returns ``below`` with the values of ``above``, key by key; lists are replaced as a whole."""
    made = dict(below)
    for key, value in above.items():
        old = made.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        made[key] = laid_over(old, value) if both and old is not None else value
    return made
