"""What these tests get: no advice about toy runs, and no waiting for the disk."""

from trainer_fixtures import (  # noqa: F401
    _no_flushing,
    _one_thread,
    _quiet_lightning,
    pytest_collection_modifyitems,
)
