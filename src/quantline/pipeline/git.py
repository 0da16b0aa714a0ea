"""What git says about the checkout."""

from __future__ import annotations

import subprocess
from pathlib import Path


def commit_of(root: Path) -> tuple[str | None, bool]:
    """The checkout's commit, and whether tracked files differ from it; (None, False) outside git."""
    commit = git_output(root, "rev-parse", "HEAD")
    dirty = git_output(root, "status", "--porcelain", "--untracked-files=no")
    return (commit.strip(), bool((dirty or "").strip())) if commit else (None, False)


def patch_of(root: Path) -> str | None:
    """How tracked files differ from the commit, as `git apply` reads it; of one too large, the files alone."""
    patch = git_output(root, "diff", "--no-ext-diff", "--no-textconv", "--no-color", "HEAD")
    if not patch or len(patch) <= MAX_PATCH_CHARS:
        return patch or None
    files = git_output(root, "diff", "--no-ext-diff", "--stat=200", "HEAD")
    return f"# A patch of {len(patch)} characters is not kept, {MAX_PATCH_CHARS} is the limit. Changed were:\n{files}"


def git_output(root: Path, *arguments: str) -> str | None:
    """What git prints of a checkout; None where it fails or is not there."""
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


MAX_PATCH_CHARS = 1_000_000
