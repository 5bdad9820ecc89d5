"""``lightning-peft migrate``: find and replace hand-written PEFT code."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_peft.cli.options import OptionParser, command_parser
from lightning_peft.cli.output import print_json
from lightning_peft.errors import ConfigError

if TYPE_CHECKING:
    from lightning_peft.migration.scan import Scan
    from lightning_peft.migration.source import Source

ABOUT = "Find PEFT, checkpoint and strategy code in a code base, and what it becomes."
_MORE = """\
PATH is a folder or a file: Python, notebooks, YAML of LightningCLI. It is read; nothing of it runs.

--write changes files after asking, in a git tree without uncommitted changes. What cannot be
changed mechanically is listed with what to write instead.

exit code: 0 if nothing was found, 1 if something was or a file could not be parsed, 2 for bad input
"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    args = _parser().parse_args(list(arguments))
    from lightning_peft.migration.edits import as_diff, new_texts, require_clean_tree
    from lightning_peft.migration.scan import scan

    if args.write:
        require_clean_tree(args.path)
    found = scan(args.path)
    changed, by_hand = new_texts(found.findings)
    diff = as_diff(changed)
    if args.json:
        print_json(_as_dict(found, by_hand, diff))
    elif args.diff:
        print(diff, end="")
    else:
        _show(found, by_hand, len(changed))
    if args.write:
        _write(args, changed, diff)
    return 1 if found.findings or found.unreadable else 0


def _parser() -> OptionParser:
    parser = command_parser("migrate", ABOUT, _MORE)
    parser.add_argument("path", metavar="PATH", type=Path)
    parser.add_argument("--diff", action="store_true", help="print the mechanical changes only")
    parser.add_argument("--write", action="store_true", help="make the mechanical changes")
    parser.add_argument("--yes", action="store_true", help="with --write: do not ask")
    return parser


def _write(args: Namespace, changed: dict[Path, tuple[Source, str]], diff: str) -> None:
    from lightning_peft.migration.edits import require_tracked, write

    if not changed:
        print("Nothing can be changed mechanically.", file=sys.stderr)
        return
    require_tracked(args.path, changed)
    if not args.yes:
        if not sys.stdin.isatty():
            raise ConfigError(
                "--write asks before it changes files. Without a terminal, add --yes."
            )
        print(diff, file=sys.stderr)
        print(f"Change {len(changed)} files? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            print("Nothing was changed.", file=sys.stderr)
            return
    write(changed)
    print(f"Changed: {', '.join(map(str, changed))}", file=sys.stderr)


def _as_dict(found: Scan, by_hand: list[str], diff: str) -> dict[str, Any]:
    findings = [
        {
            "rule": one.rule,
            "path": str(one.place.path),
            "line": one.place.line,
            "cell": one.place.cell,
            "found": one.found,
            "problem": one.problem,
            "becomes": one.becomes,
            "served": one.served,
            "mechanical": one.mechanical,
        }
        for one in found.findings
    ]
    return {
        "files": found.files,
        "findings": findings,
        "unreadable": found.unreadable,
        "by_hand": by_hand,
        "diff": diff,
    }


def _show(found: Scan, by_hand: list[str], changed: int) -> None:
    for one in found.findings:
        print(f"{one.place}: {one.rule}: {one.found}")
        if one.problem:
            print(f"    problem: {one.problem}")
        served = {"yes": "", "partly": " (partly served)", "no": " (not served)"}[one.served]
        print(f"    becomes: {one.becomes}{served}" + (" [--diff]" if one.mechanical else ""))
    for sentence in by_hand:
        print(sentence)
    for sentence in found.unreadable:
        print(f"not read: {sentence}")
    refused = sum(one.served == "no" for one in found.findings)
    print(
        f"{found.files} files, {len(found.findings)} findings, {refused} of them not served; "
        f"mechanical changes in {changed} files (--diff)."
    )
