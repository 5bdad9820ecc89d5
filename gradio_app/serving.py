"""Assembly of all pages in all languages, and the server."""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import sys
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

from gradio_app.middleware import Localized, Redirects
from gradio_app.settings import Settings
from gradio_app.studio import Studio
from gradio_app.texts import DEFAULT, LANGUAGES, Texts, route
from gradio_app.visitors import VisitorCookie

# Pages are modules of `pages` with a function `build`; home is the first.
PAGES = ("home", "new", "run", "compare", "help")
# Labels of Gradio's that its own translations leave out.
GRADIO = ("upload", "drop")
_ASSETS = Path(__file__).parent / "assets"


def prepare_environment() -> None:
    """Sets what Gradio reads while it is imported: no telemetry, and no proxy to itself."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    # It sums up all events there were, for a page of the owner's that is closed here: by default
    # after each event, which takes longer than most of our handlers.
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = "1000000000"
    # Such a path would be served whatever this page allows.
    os.environ.pop("GRADIO_ALLOWED_PATHS", None)
    for name in ("NO_PROXY", "no_proxy"):
        hosts = {host for host in os.environ.get(name, "").split(",") if host}
        os.environ[name] = ",".join(sorted(hosts | {"localhost", "127.0.0.1"}))


def build(studio: Studio) -> Any:
    """Returns ``gr.Blocks`` with every page in every language."""
    blocks = import_module("gradio").Blocks
    title = Texts()("frame.name")
    demo = blocks(title=title, analytics_enabled=False, delete_cache=(3600, 86400))
    with demo:
        for language in LANGUAGES:
            for module in PAGES:
                _build_page(studio, demo, Texts(language), module)
    demo.queue(max_size=200, default_concurrency_limit=4, api_open=False)
    return demo


def _build_page(studio: Studio, demo: Any, t: Texts, module: str) -> None:
    layout = import_module("gradio_app.pages.layout")
    page = "" if module == "home" else module
    path = route(page, t.language)
    if path:
        import_module("lightning_peft.compat.gradio").add_page(demo, path)
    import_module("gradio").Navbar(main_page_name=False, visible=False)
    with layout.page_layout(studio, t, page):
        import_module(f"gradio_app.pages.{module}").build(studio, t)
    if not path:
        import_module("gradio_app.pages.api").declare(studio, t)


def launch_options(settings: Settings, password: tuple[str, str] | None) -> dict[str, Any]:
    """Returns the arguments of ``Blocks.launch`` that make the page safe and its look its own."""
    assets = import_module("gradio_app.assets")
    options: dict[str, Any] = {
        "share": False,
        "show_error": False,
        "footer_links": [],
        # Else every input, passwords included, is kept in the browser's storage.
        "run_history": False,
        "enable_monitoring": False,
        "max_file_size": settings.limits.upload_bytes,
        "allowed_paths": [],
        "blocked_paths": [str(settings.runs), str(settings.uploads)],
        "strict_cors": True,
        "state_session_capacity": 200,
        "ssr_mode": False,
        "pwa": False,
        "mcp_server": False,
        "theme": assets.theme(),
        "css_paths": sorted(_ASSETS.glob("*.css")),
        "head": assets.head(titles(), labels()),
        "auth": password,
        "root_path": os.environ.get("GRADIO_ROOT_PATH"),
        # Gradio announces the end of an event under a name that it has no text for.
        "i18n": import_module("gradio").I18n(
            **{one: {"common.complete": Texts(one)("frame.complete")} for one in LANGUAGES}
        ),
    }
    middleware = import_module("starlette.middleware").Middleware
    pages = ("", *PAGES[1:])
    layers = [middleware(Redirects, pages=pages), middleware(Localized)]
    if settings.space:
        layers.append(middleware(VisitorCookie))
    options["app_kwargs"] = {"middleware": layers}
    return options


def titles() -> dict[str, str]:
    """Returns the titles of the pages, by path."""
    layout = import_module("gradio_app.pages.layout")
    pages = ["", *PAGES[1:]]
    return {
        route(page, language): layout.page_title(Texts(language), page)
        for language in LANGUAGES
        for page in pages
    }


def labels() -> dict[str, dict[str, str]]:
    """Returns for each other language what to call what Gradio names in English alone."""
    names = [f"frame.gradio_{name}" for name in GRADIO]
    return {
        language: {Texts()(name): Texts(language)(name) for name in names}
        for language in LANGUAGES
        if language != DEFAULT
    }


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server on ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(
    settings: Settings,
    host: str,
    port: int,
    password: tuple[str, str] | None = None,
    open_browser: bool = False,
) -> int:
    """Serves the page until it is interrupted; returns 0, or 1 if the port is taken.

    Port 0 takes a free one; ``password`` is a user name and a password.
    """
    prepare_environment()
    if port == 0:
        port = free_port(host)
    studio = Studio(settings)
    demo = build(studio)
    try:
        demo.launch(
            server_name=host,
            server_port=port,
            inbrowser=open_browser,
            quiet=True,
            prevent_thread_lock=True,
            **launch_options(settings, password),
        )
        import_module("lightning_peft.compat.gradio").use_compact_sessions(demo)
    except OSError:
        studio.close()
        print(
            f"lightning-peft: port {port} of {host} is taken. Name another with --port.",
            file=sys.stderr,
        )
        return 1
    print(
        f"The page is at http://{host}:{port}/ (runs in {settings.runs}). Ctrl-C stops the page; "
        "runs continue.",
        flush=True,
    )
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        threading.Event().wait()
    except KeyboardInterrupt:
        print("The page is closed. Active runs continue.", file=sys.stderr)
    finally:
        demo.close(verbose=False)
        studio.close()
    return 0


def free_port(host: str) -> int:
    """Returns a free port."""
    with socket.socket() as opened:
        opened.bind((host, 0))
        return int(opened.getsockname()[1])
