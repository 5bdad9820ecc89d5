"""``python -m tools.upstream lightning CHECKOUT``: runs, compares, prints counts in Markdown.

Exit code 0 if all that passes stock passes with adapters or is in ``expected.yaml``, 1 if not, and
3 if tests have not run yet; the same command then continues. Records are kept by the commits of
the checkout and of this package, and what is not committed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from tools.upstream.comparison import compare, read_expected, table
from tools.upstream.plugin import append, read_record

ROOT = Path(__file__).parents[2]
# Where the tests lie in a checkout, and those that are run by default. Of Lightning's, not those of
# accelerators, plugins and strategies, which name what they run under.
TESTS = {
    "lightning": [
        f"tests/tests_pytorch/{name}"
        for name in (
            *("callbacks", "checkpointing", "core", "loggers", "loops", "models", "profilers"),
            *("trainer", "tuner", "utilities", "test_cli.py"),
        )
    ],
    "peft": ["tests"],
}
# What is left out by default: several processes, each of which would import all of it.
EXPRESSION = {"lightning": "not ddp and not spawn and not fork and not spike", "peft": ""}
SIDES = {"lightning": ("lora", "qlora"), "peft": ("inject",)}
# What decides how tests end with adapters.
PACKAGE = ("lightning_peft", "tools/upstream/*.py")
# What pytest ends with after it ran all tests of a file: passed, failed, none collected.
_RAN_ALL = {0, 1, 5}


def run(given: argparse.Namespace, side: str, record: Path, seconds: float) -> bool:
    """Runs what has no outcome in the record of one side; returns whether all was run in time."""
    deadline = time.monotonic() + seconds
    log = record.with_suffix(".log")
    while True:
        size = record.stat().st_size if record.is_file() else 0
        with log.open("ab") as output:
            process = subprocess.Popen(
                pytest_command(given, side, record),
                cwd=given.checkout,
                env=environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                code = process.wait(max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                return False
            finally:
                # Tests start processes too, and may leave them behind.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        results = read_record(record, size).values()
        begun = [one["test"] for one in results if not one.get("outcome")]
        for test in begun:
            error = f"the process ended in this test ({code}), or it took too long"
            append(record, test=test, outcome="failed", error=error, injected=True)
        if not begun:
            if code not in _RAN_ALL:
                raise SystemExit(f"pytest ended with {code} before or after the tests: see {log}")
            return True


def pytest_command(given: argparse.Namespace, side: str, record: Path) -> list[str]:
    """Returns the command that runs the tests of one side."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tools.upstream.plugin", *given.tests]
    # Not the options of the checkout, which are for coverage and doctests.
    command += ["-o", "addopts=", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    # By a thread, which ends the process: a test that hangs in C++ takes no signal.
    command += [f"--timeout={given.timeout}", "--timeout-method=thread", "--disable-warnings"]
    command += [f"--side={side}", f"--record={record}"]
    command += [f"--every={given.every}", f"--offset={given.offset}"]
    return command + (["-k", given.k] if given.k else [])


def environment() -> dict[str, str]:
    """Returns the variables that pytest runs under; nothing is downloaded by default."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {"HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": path}


def clone(url: str, ref: str | None, parent: Path) -> Path:
    """Clones one commit of a repository, unless that was done before; returns the folder."""
    folder = parent / re.sub(r"[^\w.]+", "-", f"{url}@{ref or 'HEAD'}")
    if not folder.is_dir():
        branch = ["--branch", ref] if ref else []
        subprocess.run(["git", "clone", "--depth", "1", *branch, url, str(folder)], check=True)
    return folder


def state_of(folder: Path, *paths: str) -> str:
    """Returns the last commit of ``paths``, with a hash of what was changed since.

    Without ``paths``, the commit of all; files that are not tracked then do not count, since tests
    leave some.
    """

    def git(*words: str) -> bytes:
        command = ["git", "-C", str(folder), *words, "--", *paths]
        return subprocess.run(command, capture_output=True, check=False).stdout

    commit = git("log", "-1", "--format=%h").decode().strip()
    if not commit:
        return "no-commit"
    changes = git("diff", "--binary", "HEAD")
    new = git("ls-files", "--others", "--exclude-standard").decode().splitlines() if paths else []
    changes += b"".join(name.encode() + (folder / name).read_bytes() for name in new)
    return f"{commit}+{hashlib.sha256(changes).hexdigest()[:8]}" if changes else commit


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Returns the arguments."""
    parser = argparse.ArgumentParser(prog="python -m tools.upstream", description=__doc__)
    parser.add_argument("suite", choices=sorted(TESTS))
    parser.add_argument("checkout", help="a folder, or a URL to clone")
    parser.add_argument("--ref", help="tag or branch to clone")
    parser.add_argument("--tests", nargs="+", help="files or folders in the checkout")
    parser.add_argument("--side", help="lora (default) or qlora for Lightning's; inject for PEFT's")
    parser.add_argument("--every", type=int, default=1, help="run each n-th of all tests")
    parser.add_argument("--offset", type=int, default=0, help="first of every n-th, from 0")
    parser.add_argument("-k", help="pytest's expression; by default no tests of several processes")
    parser.add_argument("--minutes", type=float, default=60, help="stop after; both sides together")
    parser.add_argument("--timeout", type=int, default=60, help="seconds for one test")
    parser.add_argument("--results", type=Path, help="folder of the records")
    parser.add_argument("--again", action="store_true", help="rerun what did not pass, stock too")
    given = parser.parse_args(argv)
    given.tests = given.tests or TESTS[given.suite]
    given.k = EXPRESSION[given.suite] if given.k is None else given.k
    given.side = given.side or SIDES[given.suite][0]
    if given.side not in SIDES[given.suite]:
        parser.error(f"--side of {given.suite}: {', '.join(SIDES[given.suite])}")
    given.version = version(given.suite)
    given.results = given.results or ROOT / ".upstream" / f"{given.suite}-{given.version}"
    given.results = given.results.absolute()
    if "://" in given.checkout or given.checkout.startswith("git@"):
        given.checkout = clone(given.checkout, given.ref, given.results)
    elif given.ref:
        parser.error("--ref is for a URL")
    else:
        given.checkout = Path(given.checkout).absolute()
        if not given.checkout.is_dir():
            parser.error(f"there is no folder {given.checkout}")
    return given


def forget_all_but_passed(record: Path) -> None:
    """Takes what failed or was skipped out of a record, so that it runs again."""
    results = read_record(record).values()
    record.unlink(missing_ok=True)
    for one in results:
        if one.get("outcome") == "passed":
            append(record, **one)


def main(argv: list[str] | None = None) -> int:
    """Runs both sides and prints the comparison; returns the exit code."""
    given = parse(argv)
    tests, package = state_of(given.checkout), state_of(ROOT, *PACKAGE)
    folder = given.results / tests
    folder.mkdir(parents=True, exist_ok=True)
    stock, ours = folder / "stock.jsonl", folder / f"{given.side}-{package}.jsonl"
    if given.again:
        forget_all_but_passed(stock)
        forget_all_but_passed(ours)
    start, seconds = time.monotonic(), 60 * given.minutes
    finished = run(given, "stock", stock, seconds / 2)
    finished &= run(given, given.side, ours, seconds - (time.monotonic() - start))
    found = compare(read_record(stock), read_record(ours), read_expected(given.suite))
    print(f"{given.suite} {given.version}, {given.side}, {time.strftime('%Y-%m-%d')}")
    print(f"Tests of {tests}, lightning-peft {package}\n")
    print(table(found))
    for test, error in found.unexpected.items():
        print(f"\n{test}\n    {error}")
    if finished and found.missing:
        print("\nPassed stock, and not among the tests that were found with adapters:")
        print(*found.missing, sep="\n")
    if found.unexpected:
        return 1
    return 0 if finished and not found.missing else 3


if __name__ == "__main__":
    sys.exit(main())
