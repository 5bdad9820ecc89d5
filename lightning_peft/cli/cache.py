"""``lightning-peft cache``: list and clear cached bases and prepared data."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from lightning_peft.cli.options import OptionParser, command_parser
from lightning_peft.cli.output import print_json, print_table
from lightning_peft.engine.cache_entries import Entry, cache_root, entries, remove
from lightning_peft.errors import ConfigError

ABOUT = "List and clear what is kept on disk: quantized bases, prepared data, GGUF metadata."
_MORE = """\
Everything here is rebuilt when it is needed. A running run keeps what it has loaded.
Folders that an interrupted run left behind are listed as such; one that is a few minutes old may
belong to a run that is writing it.

exit code: 0, or 2 for a name that is none
"""
# Kind of entry, by the folder that it is in.
KINDS = {"bases": "quantized base", "data": "prepared data", "gguf": "GGUF file"}
_SHOWN = 12
_UNITS = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    args = _parser().parse_args(list(arguments))
    cached = [(kind, item) for kind in KINDS for item in entries(cache_root() / kind)]
    if args.command == "clear":
        _clear(_selected(cached, args.name, args.all), args.json)
    else:
        _list(cached, args.json)
    return 0


def _parser() -> OptionParser:
    parser = command_parser("cache", ABOUT, _MORE)
    commands = parser.add_subparsers(dest="command")
    clear = commands.add_parser("clear", help="remove entries")
    clear.add_argument("name", nargs="?", help="one entry; its first letters are enough")
    clear.add_argument("--all", action="store_true", help="all of them")
    # Not to overwrite the one in front of the subcommand.
    text = "print the result as JSON"
    clear.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=text)
    return parser


def _selected(cached: list[tuple[str, Entry]], name: str | None, every: bool) -> list[Entry]:
    if every == (name is not None):
        raise ConfigError("Name one entry, or pass --all: lightning-peft cache clear NAME")
    if every:
        return [item for _, item in cached]
    names = [item.folder.name for _, item in cached]
    fitting = [item for _, item in cached if item.folder.name.startswith(str(name))]
    if len(fitting) != 1 or not name:
        known = f"The names are: {', '.join(names)}" if names else "There is no entry at all"
        problem = "is the start of several names" if fitting and name else "is not an entry"
        raise ConfigError(f"{name!r} {problem} in {str(cache_root())!r}. {known}.")
    return fitting


def _clear(chosen: list[Entry], as_json: bool) -> None:
    gone = []
    for item in chosen:
        remove(item.folder)
        if item.folder.exists():
            print(f"lightning-peft: {item.folder} cannot be removed", file=sys.stderr)
        else:
            gone.append(item)
    freed = sum(item.size for item in gone)
    if as_json:
        print_json({"removed": [item.folder.name for item in gone], "bytes": freed})
    else:
        print(f"{len(gone)} removed, {_size(freed)} freed")


def _list(cached: list[tuple[str, Entry]], as_json: bool) -> None:
    rows = [_row(kind, item) for kind, item in cached]
    if as_json:
        print_json(rows)
    elif not rows:
        print(f"Nothing is kept in {cache_root()}.")
    else:
        total = _size(sum(item.size for _, item in cached))
        print_table([_cells(row) for row in rows], f"{total} in {cache_root()}")


def _row(kind: str, item: Entry) -> dict[str, Any]:
    summary = item.summary
    return {
        "name": item.folder.name,
        "kind": KINDS[kind],
        "model": summary.get("model"),
        "label": summary.get("label"),
        "settings": summary.get("settings") if kind == "bases" else None,
        "device": summary.get("device"),
        "versions": summary.get("versions"),
        "bytes": item.size,
        "age_seconds": round(item.age),
        "unused_seconds": round(item.unused),
        "whole": item.whole,
        "folder": str(item.folder),
    }


def _cells(row: dict[str, Any]) -> dict[str, str]:
    return {
        "name": row["name"][:_SHOWN],
        "kind": row["kind"] if row["whole"] else f"{row['kind']}, left behind",
        "of": str(row["model"] or "-"),
        "how": f"{row['label'] or '?'}, {row['device']}" if row["settings"] else "-",
        "size": _size(row["bytes"]),
        "age": _time(row["age_seconds"]),
        "last use": _time(row["unused_seconds"]) + " ago",
    }


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _time(seconds: int) -> str:
    length, unit = next((each for each in _UNITS if seconds >= each[0]), _UNITS[-1])
    return f"{seconds // length} {unit}"
