"""Readable explanations of write errors."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

# EFBIG comes from a limit on the size of a file.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}
# Reading never gives these, so they are of a file that is written, wherever that is.
_OF_WRITING = {*_FULL, errno.EROFS}


def write_problem(path: Path, error: BaseException) -> str | None:
    """Returns why ``path`` cannot be written, and what to do; ``None`` where it is not the disk.

    ``error`` is an ``OSError``, or what torch makes of one.
    """
    code = getattr(error, "errno", None)
    there = next((one for one in (path, *path.parents) if one.exists()), Path("/"))
    free = shutil.disk_usage(there).free
    if code in _FULL or "file write failed" in str(error):
        if code == errno.EFBIG:
            return "it would be larger than this process may write (ulimit -f)"
        return f"the disk is full ({free / 1e6:,.0f} MB are free). Free some space"
    if code in _READ_ONLY:
        return "it cannot be written to (permissions, or a disk that is read-only). Change that"
    if code in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE) and not path.parent.is_dir():
        return f"its folder is gone; {str(there)!r} is what is left. Find out what removed it"
    if code == errno.EIO:
        return "the disk reports an error"
    return None


def new_file_problem(file: str) -> str | None:
    """Returns why there can be no new ``file``, and what to do, as words behind its name.

    ``None`` if there can. Folders in its path may be absent.
    """
    if os.path.lexists(file):
        return " exists already (remove it, or name another)"
    there = next(p for p in Path(file).resolve().parents if os.path.lexists(p))
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return None
    kind = "cannot be written to" if there.is_dir() else "is not a folder"
    return f": {str(there)!r} {kind} (name another place)"


def storage_problem(folder: Path, error: OSError) -> str | None:
    """Returns why a file cannot be written, and what to do, for work that writes into ``folder``.

    ``None`` for a file that is read.
    """
    named = isinstance(error.filename, (str, os.PathLike))
    path = Path(os.path.abspath(error.filename if named else folder / "file"))
    if named and path.is_relative_to(os.path.abspath(folder)):
        return write_problem(path, error)
    problem = write_problem(path, error) if error.errno in _OF_WRITING else None
    return f"{str(path)!r}: {problem}" if problem and named else problem
