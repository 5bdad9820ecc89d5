"""Quiet Trainers for the tests of stored formats."""

from torchvision_operators import define_missing

define_missing()

from trainer_fixtures import (  # noqa: E402
    _quiet_lightning,  # noqa: F401
    pytest_collection_modifyitems,  # noqa: F401
)
