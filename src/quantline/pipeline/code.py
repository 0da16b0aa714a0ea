"""The code in a stage's identity: the source files that influence its output, each by its hash.

The files are computed from the imports: the stage's entrypoint, the modules that it imports directly or indirectly, the
workers that it starts by name, and data files that these use. Packages that do not influence the output are left out:
`core`, `config` (its values are in the identity), `pipeline`, `lifecycle`, and `toolchains` except for the workers.

`python -m stages.code` writes one hash per stage to code.yaml, which DVC watches to rerun stages after an edit.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from quantline.core.files import sha256_of

_PACKAGE = Path(__file__).resolve().parents[1]
# The checkout of the running code, which can be another one than the checkout of the results. For an installed package it is
# the folder of packages; its files are named as in a checkout, so that the same code has the same identity.
CHECKOUT = _PACKAGE.parents[1] if _PACKAGE.parent.name == "src" else _PACKAGE.parent
CODE_FILE = "code.yaml"
# They decide where and whether a stage runs, not its output: an edit of them reruns nothing.
_CARRIES = re.compile(r"(quantline|stages)$|quantline\.(core|config|pipeline|lifecycle|toolchains)(\.(?!workers\.)|$)")
# The modules among them that do have a part in an output: alarms, the use of GPUs, how a server or a fleet is started.
_MAKES = re.compile(r"quantline\.(config\.limits|core\.gpu|pipeline\.server|lifecycle\.fleet(_smoke)?)$")
# These take a second to run, and nearly every package has a part in what they say: they follow all of their imports.
_FOLLOW_ALL = ("compose", "report", "overview")
# These files define the identity. They are not in any identity themselves, but DVC must rerun every stage after an edit
# of them; otherwise `publish` would treat every result as out of date.
_IDENTITY = ("src/quantline/pipeline/identity.py", "src/quantline/pipeline/options.py")
_NAME = re.compile(r"(quantline|stages)(\.[a-z_0-9]+)+\.?")


@cache
def code_files(stage: str, checkout: Path = CHECKOUT) -> dict[str, str]:
    """SHA-256 of every source file that a stage's output depends on, by path in the checkout, sorted."""
    # The entrypoints' package names the publishing of results, which has no part in a frozen configuration.
    start = "quantline.pipeline.compose" if stage == "compose" else f"stages.{stage}"
    paths = _closure(start, checkout, everything=stage in _FOLLOW_ALL)
    return {_named(path, checkout): sha256_of(path) for path in sorted(paths)}


def source_file(name: str, checkout: Path) -> Path:
    """A file of the code by its name in a checkout: there, or in the installed package where the checkout has no code."""
    if (checkout / "stages").is_dir() or (checkout / "src").is_dir() or _PACKAGE.parent == CHECKOUT / "src":
        return checkout / name
    return CHECKOUT / name.removeprefix("src/")


def _named(path: Path, checkout: Path) -> str:
    name = path.relative_to(checkout).as_posix()
    return f"src/{name}" if name.startswith("quantline/") else name


def _sources(checkout: Path) -> Path:
    """The folder that holds the package."""
    return checkout / "src" if (checkout / "src").is_dir() else checkout


def stage_hash(stage: str, checkout: Path = CHECKOUT) -> str:
    """One hash over a stage's source files and the files that define the identity; DVC watches it.

    Short, since `dvc params diff` shows the former and the new one side by side.
    """
    files = {
        **code_files(stage, checkout),
        **{name: sha256_of(_sources(checkout) / name.removeprefix("src/")) for name in _IDENTITY},
    }
    return hashlib.sha256("".join(f"{name} {files[name]}\n" for name in sorted(files)).encode()).hexdigest()[:16]


def _closure(start: str, checkout: Path, *, everything: bool) -> set[Path]:
    files: set[Path] = set()
    ahead, seen = [start], {start}
    while ahead:
        path = module_file(ahead.pop(), checkout)
        if path is None:
            continue
        found, beside = _references(path)
        files |= {path, *beside}
        for name in _modules(found, checkout):
            left_out = not everything and not _MAKES.match(name) and _CARRIES.match(name)
            if name not in seen and not left_out:
                seen.add(name)
                ahead.append(name)
    return files


def module_file(module: str, checkout: Path) -> Path | None:
    """The file of a dotted module of this project; None if there is none."""
    base = checkout if module.startswith("stages") else _sources(checkout)
    path = base / module.replace(".", "/")
    return next((found for found in (path.with_suffix(".py"), path / "__init__.py") if found.is_file()), None)


def _modules(names: Iterable[str], checkout: Path) -> Iterator[str]:
    for name in names:
        if name.endswith("."):  # the start of a composed module name: all modules of that package
            folder = _sources(checkout) / name.rstrip(".").replace(".", "/")
            yield from (f"{name}{path.stem}" for path in sorted(folder.glob("*.py")))
        elif module_file(name, checkout) is not None:
            yield name


@cache
def _references(path: Path) -> tuple[tuple[str, ...], tuple[Path, ...]]:
    """The modules that a file imports or names at run time, and the data files in its folder that it names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: list[str] = []
    beside: list[Path] = []
    for node in _runtime_nodes(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if _NAME.fullmatch(node.value):
                names.append(node.value)
            elif re.fullmatch(r"[a-z][a-z_0-9]*(\.[a-z0-9]+)*", node.value) and (path.parent / node.value).exists():
                beside += _data(path.parent / node.value)
    beside += _data(path.with_suffix(".yaml"))
    return tuple(name for name in dict.fromkeys(names) if name.split(".")[0] in ("quantline", "stages")), tuple(beside)


def _runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    ahead: list[ast.AST] = [tree]
    while ahead:
        node = ahead.pop()
        yield node
        if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            ahead.extend(ast.iter_child_nodes(node))


def _data(path: Path) -> list[Path]:
    files = path.rglob("*") if path.is_dir() else [path]
    return [file for file in files if file.is_file() and file.suffix not in (".py", ".pyc")]
