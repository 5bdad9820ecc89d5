"""Quiet Trainers for the tests of stored formats."""

from trainer_fixtures import _quiet_lightning, pytest_collection_modifyitems  # noqa: F401
