"""Reads the state of the checkout from git."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path


def commit_of(root: Path) -> tuple[str | None, bool]:
    """The checkout's commit, and whether tracked files differ from it; (None, False) outside git."""
    commit = git_output(root, "rev-parse", "HEAD")
    dirty = git_output(root, "status", "--porcelain", "--untracked-files=no")
    return (commit.strip(), bool((dirty or "").strip())) if commit else (None, False)


def patch_of(root: Path) -> str | None:
    """The patch of tracked files against the commit, for `git apply`; only the names of the files if it is too large."""
    patch = git_output(root, *_DIFF)
    if not patch or len(patch) <= MAX_PATCH_CHARS:
        return patch or None
    files = git_output(root, "diff", "--no-ext-diff", "--stat=200", "HEAD")
    return (
        f"# The patch has {len(patch)} characters and was left out, the limit is {MAX_PATCH_CHARS}. Changed:\n{files}"
    )


def whole_patch(root: Path, without: Sequence[str]) -> bytes:
    """The patch of tracked files against the commit, of any size and with binary files; empty if there is none.

    without: paths, relative to the checkout, that it leaves out.
    """
    arguments = [*_DIFF, "--binary", "--", ".", *(f":(exclude){name}" for name in without)]
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=True)
    return done.stdout


def untracked(root: Path) -> list[str]:
    """The files that git neither tracks nor ignores."""
    listed = git_output(root, "ls-files", "-z", "--others", "--exclude-standard")
    return sorted(name for name in (listed or "").split("\0") if name)


def git_output(root: Path, *arguments: str) -> str | None:
    """The output of a git command in a checkout; None if it fails or git is not installed."""
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


MAX_PATCH_CHARS = 1_000_000
# Whatever the user's own settings of git are, `git apply` reads it.
_DIFF = ("diff", "--no-ext-diff", "--no-textconv", "--no-color", "--src-prefix=a/", "--dst-prefix=b/", "HEAD")
