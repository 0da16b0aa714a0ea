"""The code's part of an identity: the files that have a part in what a stage makes, each by its content.

Which those are stands in dvc.yaml, among each stage's dependencies, and a test holds that list against the imports; so the
fingerprint of a stage changes with just the code that DVC runs it again for.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from quantline.core.files import sha256_of

# The checkout whose code runs, which need not be the one whose results are looked at.
CHECKOUT = Path(__file__).resolve().parents[3]
_CODE = ("src/", "stages/")
# Says what identities are made of, and makes nothing.
_IDENTITY = "src/quantline/pipeline/identity.py"


@cache
def code_files(stage: str, checkout: Path = CHECKOUT) -> dict[str, str]:
    """SHA-256 of every source file that a stage's output follows from, by its path in the checkout, in order.

    A stage that dvc.yaml does not have is known by all of the library.
    """
    named = _dependencies(checkout).get(stage, ["src/quantline", f"stages/{stage}.py"])
    paths: set[Path] = set()
    for name in named:
        path = checkout / name
        paths |= {path} if path.is_file() else {*path.rglob("*.py"), *path.rglob("*.yaml")}
    known = {path.relative_to(checkout).as_posix(): path for path in paths}
    return {name: sha256_of(known[name]) for name in sorted(known) if name != _IDENTITY and known[name].is_file()}


@cache
def _dependencies(checkout: Path) -> dict[str, list[str]]:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    stages = yaml.load((checkout / "dvc.yaml").read_text(encoding="utf-8"), loader)["stages"]  # noqa: S506 - a safe one
    deps = {name: body.get("do", body).get("deps", []) for name, body in stages.items()}
    return {name: [dep for dep in found if dep.startswith(_CODE)] for name, found in deps.items()}
