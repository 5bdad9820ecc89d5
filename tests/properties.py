"""How property-based tests run: a few examples by default, 2,000 in `make test-long`."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

MANY = 2000
LONG = (pytest.mark.long, pytest.mark.timeout(3000))


def few_and_many(few: int = 20) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Runs a property, a test under ``@given``, on ``few`` examples and on ``MANY``."""

    def decorate(test: Any) -> Callable[..., Any]:
        both = [pytest.param(few, id="few"), pytest.param(MANY, id="many", marks=LONG)]

        @pytest.mark.parametrize("examples", both)
        def run(examples: int) -> None:
            how = {"deadline": None, "derandomize": True, "database": None}
            # Settings stay on the function that they are put on, and are put on once.
            mine = FunctionType(
                test.__code__, test.__globals__, test.__name__, test.__defaults__, test.__closure__
            )
            mine.__kwdefaults__ = test.__kwdefaults__
            mine.__dict__.update(test.__dict__)
            settings(max_examples=examples, suppress_health_check=list(HealthCheck), **how)(mine)()

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate
