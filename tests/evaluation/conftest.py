"""Settings for the tests of benchmarks."""

from trainer_fixtures import _no_flushing, _one_thread, _quiet_lightning  # noqa: F401
