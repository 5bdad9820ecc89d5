"""``lightning-peft app``: serve the web page on this machine."""

from __future__ import annotations

import argparse
import getpass
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from gradio_app.settings import Settings
from lightning_peft.cli.options import OptionParser, command_parser
from lightning_peft.errors import ConfigError

ABOUT = "Open the web page: recipes, data checks, live runs, chat, export."
_MORE = """\
The page starts the other commands in processes of their own and reads the folders of runs: closing
it, or stopping it with Ctrl-C, leaves runs going.

Anyone who can open the page can train on this machine and read the folders below. So it listens
to this machine alone, and --host wants a password, which is read from the environment variable
LIGHTNING_PEFT_PASSWORD or asked for. The name that goes with it is `studio`.

exit code: 0 when stopped, 1 if the port is taken, 2 for bad input
"""
USER = "studio"
_PASSWORD = "LIGHTNING_PEFT_PASSWORD"
# Shorter ones are guessed: nothing slows down an attacker who tries many.
_SHORTEST = 12


def main(arguments: Sequence[str]) -> int:
    """Runs the command; returns 0 when stopped, 1 if the port is taken, 2 for bad input."""
    args = _parser().parse_args(list(arguments))
    from gradio_app.serving import is_loopback, prepare_environment, serve

    prepare_environment()
    try:
        import_module("gradio")
    except ImportError as error:
        raise ConfigError(
            f"The page needs Gradio, which is not installed ({error}). Install it with: "
            "pip install 'lightning-peft[app]'"
        ) from error
    password = None if is_loopback(args.host) else _password(args.host)
    for option, folder in (("data-root", args.data_root), ("models", args.models)):
        if folder is not None and not folder.is_dir():
            raise ConfigError(
                f"--{option} {str(folder)!r} is not a folder. Make it, or name another."
            )
    settings = Settings.on_this_machine(args.runs, args.data_root, args.models)
    return serve(settings, args.host, args.port, password, args.open)


def _parser() -> OptionParser:
    parser = command_parser("app", ABOUT, _MORE, json="")
    add = parser.add_argument
    add("--port", type=int, default=7860, help="default: 7860")
    add("--host", default="127.0.0.1", help="address to listen on; default: this machine alone")
    add("--runs", type=Path, default=Path("runs"), help="folder of all runs; default: runs")
    add("--data-root", type=Path, default=Path(), help="data may be named by paths below this one")
    add("--models", type=Path, help="folder whose subfolders are offered as models")
    add("--open", action=argparse.BooleanOptionalAction, default=True, help="open the browser")
    return parser


def _password(host: str) -> tuple[str, str]:
    """Returns the name and a password that is not easily guessed, for other machines."""
    word = os.environ.get(_PASSWORD, "")
    if not word and sys.stdin.isatty():
        word = getpass.getpass(
            f"Password for the page on {host} ({_SHORTEST} characters or more): "
        )
    if len(word) < _SHORTEST:
        raise ConfigError(
            f"--host {host}: other machines could open the page and train on this one, so it "
            f"needs a password of {_SHORTEST} characters or more; it has {len(word)}. Set "
            f"{_PASSWORD}, or leave out --host and reach the page through an SSH tunnel."
        )
    return USER, word
