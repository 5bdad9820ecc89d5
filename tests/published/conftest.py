"""As for the modules of our own, and deaf to warnings of other packages."""

from __future__ import annotations

import pytest
from trainer_fixtures import _no_flushing, _one_thread, _quiet_lightning  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "published" in item.nodeid.split("::")[0]:
            item.add_marker(pytest.mark.filterwarnings("ignore"))
