"""Availability and version of the harness."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

from lightning_peft.errors import ConfigError


def harness_version() -> str:
    """Returns the version of the harness."""
    if find_spec("lm_eval") is None:
        raise ConfigError(
            "Benchmarks take EleutherAI's lm-evaluation-harness, which is not installed: pip "
            "install 'lightning-peft[eval]'."
        )
    return version("lm_eval")
