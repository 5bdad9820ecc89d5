"""Servers and browsers for the tests of the page."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gradio_app.runs.store import RunStore
from gradio_app.visitors import COOKIE
from tests.app import browsing
from tests.app.runs import settings
from tests.app.servers import Server

_PAGES = pytest.StashKey[list[tuple[Any, browsing.PageMonitor]]]()


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

    def start(folder: Path | None = None, env: Any = None, **options: Any) -> Server:
        server = Server(folder or tmp_path_factory.mktemp("site"), options, env or {}).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """Servers for all modules that leave others' runs alone, one for each set of options."""
    started: dict[str, Server] = {}

    def shared(**options: Any) -> Server:
        key = str(options)
        if key not in started:
            started[key] = Server(tmp_path_factory.mktemp("shared"), options).start()
        return started[key]

    yield shared
    for server in started.values():
        server.stop()


@pytest.fixture(scope="module")
def site(_shared: Callable[..., Server]) -> Server:
    """A page with the fake trainer; modules that count runs or stop it have their own."""
    return _shared(trainer="fake")


@pytest.fixture(scope="module")
def space(_shared: Callable[..., Server]) -> Server:
    """A Space with the fake trainer."""
    return _shared(trainer="fake", space=True)


@pytest.fixture(scope="module")
def store(site: Server) -> RunStore:
    return RunStore(settings(site.folder))


@pytest.fixture(scope="module")
def client(site: Server) -> Iterator[httpx.Client]:
    with site.client() as opened:
        yield opened


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
    opened: list[tuple[Any, browsing.PageMonitor]] = []
    request.node.stash[_PAGES] = opened

    def visit(url: str, cookie: str = "", **options: Any) -> Any:
        context = browsing.open_context(browser, **options)
        if cookie:
            context.add_cookies([{"name": COOKIE, "value": cookie, "url": url}])
        page = context.new_page()
        opened.append((page, browsing.PageMonitor(page)))
        page.goto(url)
        return page

    yield visit
    for page, watch in opened:
        page.context.close()
        assert not watch.errors
        assert not watch.foreign
