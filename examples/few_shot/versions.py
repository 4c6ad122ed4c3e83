"""What made numbers: versions of packages, and the commit of this code."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import re
from collections.abc import Iterable
from pathlib import Path

import fairseq_lite

_COMMIT = re.compile(r"[0-9a-f]{40,64}")


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python, of this package, and of others; `commit` where this is a git clone.

    Args:
        packages: the others, by the names under which they are installed.
    """
    found = {"fairseq_lite": fairseq_lite.__version__, "python": platform.python_version()}
    commit = commit_of(Path(fairseq_lite.__file__).parents[1])
    return found | ({} if commit is None else {"commit": commit}) | of_packages(packages)


def of_packages(names: Iterable[str]) -> dict[str, str]:
    """Versions of packages, in order; those that are not installed are left out."""
    found = {}
    for name in sorted(set(names)):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache  # what is running stays what it was when another commit is checked out
def commit_of(folder: Path) -> str | None:
    """The commit that is checked out in a git clone; None in another folder.

    Files are read instead of asking git, which need not be installed, and refuses clones of others.
    """
    try:
        place = folder / ".git"
        if place.is_file():  # a work tree beside its clone names where its own state lies
            place = folder / place.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
        head = (place / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref:"):
            return _commit(head)
        shared = place / "commondir"
        if shared.is_file():
            place = place / shared.read_text(encoding="utf-8").strip()
        return _of_branch(place, head.removeprefix("ref:").strip())
    except (OSError, UnicodeDecodeError):
        return None


def _of_branch(place: Path, name: str) -> str | None:
    """The commit of a branch, which has a file of its own or a line in that of many."""
    if (place / name).is_file():
        return _commit((place / name).read_text(encoding="utf-8").strip())
    for line in (place / "packed-refs").read_text(encoding="utf-8").splitlines():
        commit, _, of = line.partition(" ")
        if of == name:
            return _commit(commit)
    return None


def _commit(text: str) -> str | None:
    return text if _COMMIT.fullmatch(text) else None
