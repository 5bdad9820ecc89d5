"""What all tests of tasks get."""

from trainer_fixtures import (  # noqa: F401
    _no_flushing,
    _one_thread,
    _quiet_lightning,
    pytest_collection_modifyitems,
)
