"""Servers and browsers for the tests of the page."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.app import browsing
from tests.app.servers import Server

_PAGES = pytest.StashKey[list[tuple[Any, browsing.HealthMonitor]]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tells of a test that fails what its pages showed."""
    report = yield
    if report.when == "call" and report.failed:
        for page, _ in item.stash.get(_PAGES, []):
            with contextlib.suppress(Exception):
                report.sections.append((f"page {page.url}", page.inner_text("body")))
    return report


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Starts servers, each in a new folder unless one is named; they end with the module."""
    started: list[Server] = []

    def start(folder: Path | None = None, **options: Any) -> Server:
        server = Server(folder or tmp_path_factory.mktemp("site"), options).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    if browsing.chromium() is None:
        pytest.fail(
            "no Chromium is installed, which the tests of the page need. On Debian or Ubuntu: "
            "apt install chromium; elsewhere, any chromium or google-chrome on the PATH"
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = browsing.launch(playwright)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Any, request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Opens pages, each as a new visitor; afterwards, none may have done what it must not."""
    opened: list[tuple[Any, browsing.HealthMonitor]] = []
    request.node.stash[_PAGES] = opened

    def visit(url: str, **options: Any) -> Any:
        page = browsing.open_context(browser, **options).new_page()
        opened.append((page, browsing.HealthMonitor(page)))
        page.goto(url)
        return page

    yield visit
    for page, watch in opened:
        page.context.close()
        assert not watch.errors
        assert not watch.foreign
