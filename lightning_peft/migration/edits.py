"""Changes of a code base as diffs, and their writing."""

from __future__ import annotations

import ast
import difflib
import os
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from lightning_peft.errors import ConfigError
from lightning_peft.migration.finding import Edit, Finding
from lightning_peft.migration.source import Source

_GIT_SECONDS = 60
# Of these, imports that nothing uses any more are removed with the code that used them.
_PACKAGES = ("peft", "pytorch_lightning.plugins", "lightning.pytorch.plugins")


def new_texts(findings: Iterable[Finding]) -> tuple[dict[Path, tuple[Source, str]], list[str]]:
    """Returns the changed files by path, and a sentence for each that has to be changed by hand.

    A change is made as a whole: a finding whose pieces cannot all be placed changes nothing.
    """
    problems: list[str] = []
    edits: dict[Path, list[Edit]] = defaultdict(list)
    for finding in findings:
        if not finding.edits:
            continue
        taken = [edit for edit in finding.edits if not _placeable(edit, edits)]
        if taken:
            problems.append(f"{finding.place}: {finding.rule} is left to you: {_reason(taken[0])}")
            continue
        for edit in finding.edits:
            edits[edit.source.path].append(edit)
    changed = {path: (given[0].source, _changed(given)) for path, given in edits.items() if given}
    return changed, problems


def _placeable(edit: Edit, others: dict[Path, list[Edit]]) -> bool:
    overlap = any(
        edit.start < other.end and other.start < edit.end for other in others[edit.source.path]
    )
    return not (overlap or edit.source.cells or not _whole_lines(edit))


def _reason(edit: Edit) -> str:
    if edit.source.cells:
        return "notebooks are not written"
    return "it shares its lines with other code or with another change"


def _whole_lines(edit: Edit) -> bool:
    """Whether an edit that removes lines removes nothing but its own statement."""
    if not edit.removes:
        return True
    lines = _lines(edit.source)[edit.start[0] - 1 : edit.end[0] - 1]
    code = b"".join(lines).decode("utf-8")
    try:
        parsed = ast.parse(f"class _:\n{code}" if code[:1].isspace() else code).body
    except SyntaxError:
        return False
    inner = parsed[0].body if code[:1].isspace() else parsed  # type: ignore[attr-defined]
    return [type(statement).__name__ for statement in inner] == [edit.removes]


def _split(text: str) -> list[str]:
    """Returns lines with their ends; form feeds and the like end none, as for `ast`."""
    return [line for line in re.split(r"(?<=\n)", text) if line]


def _lines(source: Source) -> list[bytes]:
    return source.text.encode("utf-8").splitlines(keepends=True)


def _changed(edits: list[Edit]) -> str:
    source = edits[0].source
    lines = _lines(source)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    content = b"".join(lines)
    for edit in sorted(edits, key=lambda edit: edit.start, reverse=True):
        start = starts[edit.start[0] - 1] + edit.start[1]
        end = min(starts[min(edit.end[0], len(starts)) - 1] + edit.end[1], len(content))
        text = edit.text or _in_place_of(source, edit)
        if edit.removes and not text:
            end = _behind_blank_lines(content, start, end)
        content = content[:start] + text.encode("utf-8") + content[end:]
    needed = sorted({edit.needs for edit in edits if edit.needs})
    return _with_imports(content.decode("utf-8"), needed)


def _behind_blank_lines(content: bytes, start: int, end: int) -> int:
    """Returns the end of a removal with the blank lines after it, where some are before it."""
    for newline in (b"\n", b"\r\n"):
        while content[:start].endswith(2 * newline) and content[end:].startswith(newline):
            end += len(newline)
    return end


def _in_place_of(source: Source, edit: Edit) -> str:
    """Returns ``pass`` where a removed statement was the only one of its block."""
    for node in ast.walk(source.tree):
        for block in ("body", "orelse", "finalbody"):
            inner = getattr(node, block, None)
            if isinstance(inner, list) and len(inner) == 1 and not isinstance(node, ast.Module):
                only = inner[0]
                if (only.lineno, (only.end_lineno or 0) + 1) == (edit.start[0], edit.end[0]):
                    return f"{' ' * only.col_offset}pass\n"
    return ""


def _with_imports(text: str, names: list[str]) -> str:
    """Returns code with an import of names, and without imports of PEFT that nothing uses."""
    tree = ast.parse(text)
    newline = "\r\n" if "\r\n" in text else "\n"
    lines = _split(text)
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    last = max((node.end_lineno or 0 for node in imports), default=_start(tree, lines))
    changes = []
    if names:
        line = f"from lightning_peft import {', '.join(names)}{newline}"
        changes.append((last, last, line))
    for node in imports:
        module = getattr(node, "module", None) or ""
        if not module.startswith(_PACKAGES) or node.col_offset:
            continue
        kept = [alias for alias in node.names if (alias.asname or alias.name) in used]
        if len(kept) < len(node.names):
            line = ast.unparse(ast.ImportFrom(module, kept, 0)) + newline if kept else ""
            changes.append((node.lineno - 1, node.end_lineno or 0, line))
    for start, end, line in sorted(changes, reverse=True):
        lines[start:end] = [line] if line else []
    return "".join(lines)


def _start(tree: ast.Module, lines: list[str]) -> int:
    """Returns how many lines come before the first import: comments, and a docstring."""
    comments = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    first = tree.body[0] if tree.body else None
    string = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return (first.end_lineno or 0) if first is not None and string else comments


def as_diff(changed: dict[Path, tuple[Source, str]]) -> str:
    """Returns a unified diff, which ``git apply`` and ``patch -p1`` take in the current folder."""
    parts = []
    for path, (source, text) in changed.items():
        name = Path(os.path.relpath(path)).as_posix()
        before, after = map(_split, (source.text, text))
        for line in difflib.unified_diff(before, after, f"a/{name}", f"b/{name}"):
            parts.append(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n")
    return "".join(parts)


def require_clean_tree(path: Path) -> None:
    """Refuses to write where git could not give the files of before back.

    Raises:
        ConfigError: If the path is not in a git tree, or in one with changes.
    """
    folder = path if path.is_dir() else path.parent
    command = ["git", "-C", str(folder), "status", "--porcelain", "--", "."]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"--write needs git to look for changes, and it failed: {error}"
        ) from error
    if ran.returncode:
        raise ConfigError(
            f"--write: {str(folder)!r} is not in a git tree, so the files of before could not be "
            "brought back. Run `git init`, add and commit first, or use --diff."
        )
    if ran.stdout.strip():
        raise ConfigError(
            f"--write: the git tree of {str(folder)!r} has changes that are not committed. Commit "
            "or stash them first, or use --diff."
        )


def write(changed: dict[Path, tuple[Source, str]]) -> None:
    """Writes changed files, in the encoding that each had."""
    contents = {path: text.encode(source.encoding) for path, (source, text) in changed.items()}
    for path, content in contents.items():
        path.write_bytes(content)
