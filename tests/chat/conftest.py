"""Settings for the tests of chat and comparison."""

from trainer_fixtures import _no_flushing, _one_thread, _quiet_lightning  # noqa: F401
