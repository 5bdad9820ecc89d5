"""How property-based tests run: a few examples by default, 500 in `make test-long`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

MANY = pytest.param(500, id="many", marks=pytest.mark.long)


def few_and_many(few: int = 20, **strategies: Any) -> Callable[[Any], Callable[[int], None]]:
    """Runs a property as ``given`` does with these strategies, on a few examples and on many."""

    def decorate(test: Any) -> Callable[[int], None]:
        @pytest.mark.parametrize("examples", [pytest.param(few, id="few"), MANY])
        def run(examples: int) -> None:
            bounds = settings(max_examples=examples, suppress_health_check=list(HealthCheck))
            bounds(given(**strategies)(test))()

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate
