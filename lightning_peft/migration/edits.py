"""Edits of source files as diffs."""

from __future__ import annotations

import ast
import difflib
import os
import re
import subprocess
import warnings
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from lightning_peft.errors import ConfigError, first_line
from lightning_peft.migration.finding import Edit, Finding
from lightning_peft.migration.source import Source, nodes

_GIT_SECONDS = 60
# Of these, imports that nothing uses any more are removed with the code that used them.
_PACKAGES = re.compile(r"(peft|pytorch_lightning\.plugins|lightning\.pytorch\.plugins)(\.|$)")


def new_texts(findings: Iterable[Finding]) -> tuple[dict[Path, tuple[Source, str]], list[str]]:
    """Returns the changed files by path, and a sentence for each that has to be changed by hand.

    A change is made as a whole: a finding whose pieces cannot all be placed changes nothing.
    """
    problems: list[str] = []
    placed: list[Finding] = []
    for finding in findings:
        others = [edit for one in placed for edit in one.edits]
        reasons = (
            _obstacle(edit, [*others, *finding.edits[:index]])
            for index, edit in enumerate(finding.edits)
        )
        reason = next(filter(None, reasons), "")
        if reason:
            problems.append(f"{finding.place}: {finding.rule} is left to you: {reason}")
        elif finding.edits:
            placed.append(finding)
    edits: dict[Path, list[Edit]] = defaultdict(list)
    for finding in placed:
        for edit in finding.edits:
            edits[edit.source.path].append(edit)
    changed = {}
    for path, given in edits.items():
        try:
            changed[path] = (given[0].source, _changed(given))
        except SyntaxError as error:
            reason = f"{path} would not be Python any more ({first_line(error)})"
            left = [one for one in placed if any(e.source.path == path for e in one.edits)]
            problems += [f"{one.place}: {one.rule} is left to you: {reason}" for one in left]
            again, more = new_texts(
                one for one in placed if all(one is not other for other in left)
            )
            return again, problems + more
    return changed, problems


def _obstacle(edit: Edit, others: Iterable[Edit]) -> str:
    """Returns why a piece cannot be changed; ``""`` if it can."""
    if edit.source.cells:
        return "notebooks are not written"
    overlap = any(
        edit.source is other.source and edit.start < other.end and other.start < edit.end
        for other in others
    )
    if overlap or not _whole_lines(edit):
        return "it shares its lines with other code or with another change"
    start, end = _span(edit)
    if not edit.removes and b"#" in edit.source.text.encode("utf-8")[start:end]:
        return "a comment in it would be lost"
    if edit.needs and edit.needs in _bound(edit.source):
        return f"{edit.needs} is a name of its own there"
    return ""


def _bound(source: Source) -> set[str]:
    """Returns the names that a file defines or imports, besides those of this package."""
    methods = {id(item) for cls in source.classes for item in cls.body}
    found = {name for name, full in source.names.items() if full != f"lightning_peft.{name}"}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)) and id(node) not in methods:
            found.add(node.name)
    return found


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
    """Returns lines with their ends, as git counts them: nothing but line feeds ends one."""
    return [line for line in re.split(r"(?<=\n)", text) if line]


def _lines(source: Source) -> list[bytes]:
    """Returns lines with their ends, as ``ast`` counts them: form feeds and the like end none."""
    return source.text.encode("utf-8").splitlines(keepends=True)


def _span(edit: Edit) -> tuple[int, int]:
    """Returns the bytes of a file that a piece takes up: its first, and the one behind it."""
    lines = _lines(edit.source)
    start, end = (sum(map(len, lines[: at[0] - 1])) + at[1] for at in (edit.start, edit.end))
    return start, min(end, sum(map(len, lines)))


def _changed(edits: list[Edit]) -> str:
    """Returns the new text of a file.

    Raises:
        SyntaxError: If it would not be Python.
    """
    source = edits[0].source
    content = source.text.encode("utf-8")
    filled = _emptied_blocks(source, edits)
    for edit in sorted(edits, key=lambda edit: edit.start, reverse=True):
        start, end = _span(edit)
        new = (edit.text or filled.get(edit.start, "")).encode("utf-8")
        if edit.removes and not new:
            end = _behind_blank_lines(content, start, end)
        content = content[:start] + new + content[end:]
    needed = sorted({edit.needs for edit in edits if edit.needs})
    text = _with_imports(source, content.decode("utf-8"), needed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compile(text, str(source.path), "exec", dont_inherit=True)
    return text


def _behind_blank_lines(content: bytes, start: int, end: int) -> int:
    """Returns the end of a removal with the blank lines after it, where some are before it."""
    for newline in (b"\n", b"\r\n"):
        while content[:start].endswith(2 * newline) and content[end:].startswith(newline):
            end += len(newline)
    return end


def _emptied_blocks(source: Source, edits: list[Edit]) -> dict[tuple[int, int], str]:
    """Returns ``pass`` by the start of a removal, where no statement of a block would be left."""
    removed = {(edit.start, edit.end) for edit in edits if edit.removes}
    lines = _lines(source)
    found = {}
    for node in ast.walk(source.tree):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if not isinstance(block, list) or not block or isinstance(node, ast.Module):
                continue
            pieces = [Edit.remove(source, statement) for statement in block]
            if all((piece.start, piece.end) in removed for piece in pieces):
                line = lines[pieces[0].start[0] - 1].decode("utf-8")
                indent = line[: len(line) - len(line.lstrip())]
                found[pieces[0].start] = f"{indent}pass" + ("\r\n" if "\r\n" in line else "\n")
    return found


def _with_imports(source: Source, text: str, names: list[str]) -> str:
    """Returns code with an import of names, and without imports that were of use before only."""
    tree = ast.parse(text)
    newline = "\r\n" if "\r\n" in text else "\n"
    lines = [line.decode("utf-8") for line in text.encode("utf-8").splitlines(keepends=True)]
    unused = _words(source.tree) - _words(tree)
    imports = [node for node in tree.body if _is_import(node) and _is_alone(node, tree)]
    changes = []
    if names:
        used = [node.lineno for node in nodes(tree, ast.Name) if node.id in names]
        ends = [node.end_lineno or 0 for node in imports]
        last = max((end for end in ends if end < min(used)), default=_start(tree, lines))
        line = f"from lightning_peft import {', '.join(names)}{newline}"
        changes.append((last, last, line))
    for node in imports:
        if not isinstance(node, ast.ImportFrom) or node.level:
            continue
        start, end = node.lineno - 1, node.end_lineno or 0
        kept = [alias for alias in node.names if (alias.asname or alias.name) not in unused]
        if not _PACKAGES.match(node.module or "") or "#" in "".join(lines[start:end]):
            continue
        if len(kept) < len(node.names):
            line = ast.unparse(ast.ImportFrom(node.module, kept, 0)) + newline if kept else ""
            changes.append((start, end, line))
    for start, end, line in sorted(changes, reverse=True):
        lines[start:end] = [line] if line else []
    return "".join(lines)


def _words(tree: ast.Module) -> set[str]:
    """Returns the names that code uses, and all words in its strings, such as of ``__all__``."""
    found = {node.id for node in nodes(tree, ast.Name)}
    for node in nodes(tree, ast.Constant):
        if isinstance(node.value, str):
            found |= set(re.findall(r"\w+", node.value))
    return found


def _is_import(node: ast.stmt) -> bool:
    return isinstance(node, (ast.Import, ast.ImportFrom))


def _is_alone(node: ast.stmt, tree: ast.Module) -> bool:
    """Whether no other statement shares lines with one of a file."""
    end = node.end_lineno or 0
    others = (one for one in tree.body if one is not node)
    return not any(one.lineno <= end and node.lineno <= (one.end_lineno or 0) for one in others)


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
    """Refuses to write where git could not give the files of before back."""
    folder = _folder(path)
    ran = _git(folder, "status", "--porcelain", "--", ".")
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


def require_tracked(path: Path, changed: Iterable[Path]) -> None:
    """Refuses to write files that git ignores, or that are links to other places."""
    folder = _folder(path)
    names = {file.relative_to(folder).as_posix(): file for file in changed}
    ran = _git(folder, "--literal-pathspecs", "ls-files", "-z", "--", *names)
    tracked = set(ran.stdout.split("\0"))
    refused = [
        str(file) for name, file in names.items() if file.is_symlink() or name not in tracked
    ]
    if refused:
        raise ConfigError(
            f"--write: git could not give these files back, as it ignores them or they are links: "
            f"{', '.join(refused)}. Add them to git or name a folder without them, or use --diff."
        )


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _git(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs git in a folder."""
    command = ["git", "-C", str(folder), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"--write needs git to look for changes, and it failed: {error}"
        ) from error


def write(changed: dict[Path, tuple[Source, str]]) -> None:
    """Writes changed files, in the encoding that each had."""
    contents = {path: text.encode(source.encoding) for path, (source, text) in changed.items()}
    for path, content in contents.items():
        path.write_bytes(content)
