"""What every test gets: no network, few threads, a fixed seed, and guards against leaks."""

from __future__ import annotations

import os

# Read by transformers, huggingface_hub and tokenizers when they are imported, so set before.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import gc
import random
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from finished import lora_run, qlora_run  # noqa: F401
from hypothesis import settings
from program import program, refused  # noqa: F401

from lightning_peft.plugin.namespace import use_namespace

# A shell starts what it runs in the background with interrupts ignored, which is passed on to
# processes of tests.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What is computed here is so small that threads would only wait for each other.
torch.set_num_threads(1)

# The same examples in every run, and none kept from an earlier one.
settings.register_profile("same", derandomize=True, database=None, deadline=None)
settings.load_profile("same")

# Caches of the tools that may run a test, not output of the code under test.
CACHES = {"__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".coverage", ".hypothesis"}


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keeps the garbage collector from what is imported and collected, which lives to the end."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked ``gpu`` where there is no CUDA device; long tests get more time.

    Files of the page come between others: two browsers at the same time would wait for each other.
    """
    files = list(dict.fromkeys(item.path for item in items))
    page = [file for file in files if file.parent.name == "app"]
    others = [file for file in files if file.parent.name != "app"]
    share = len(others) // max(1, len(page))
    places = {file: place * (share + 1) for place, file in enumerate(page)}
    places |= {file: place + place // max(1, share) + 1 for place, file in enumerate(others)}
    items.sort(key=lambda item: places[item.path])
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("long") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(1800))


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds Python, NumPy and torch before every test, so that no result depends on test order."""
    value = 20
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def _lightning() -> Iterator[None]:
    """Both Lightning packages are imported by tests; what names neither is of this one."""
    use_namespace("pytorch_lightning")
    yield
    use_namespace(None)


@pytest.fixture(autouse=True)
def _restore_environment() -> Iterator[None]:
    """Puts back every environment variable that the test changed, added or removed."""
    before = dict(os.environ)
    yield
    own = "PYTEST_CURRENT_TEST"  # pytest's own, different in each phase of a test
    for name in os.environ.keys() - before.keys() - {own}:
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if name != own})


@pytest.fixture(autouse=True)
def _no_leftover_files() -> Iterator[None]:
    """Fails a test that leaves files in the working directory instead of in ``tmp_path``."""
    folder = Path.cwd()
    before = set(os.listdir(folder))
    yield
    os.chdir(folder)
    left = sorted(set(os.listdir(folder)) - before - CACHES)
    if left:
        pytest.fail(f"the test left {left} in the working directory; write to tmp_path instead")
