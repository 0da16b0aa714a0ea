"""Install what `python -m stages.bundle` packed, without a network: `make setup BUNDLE=DIR` runs this.

Standard library only, since there is no environment yet. Every file is checked by its SHA-256 before it is unpacked, and an
environment counts as built only when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

CORE, STATE = "core", "quantline-state.json"


def fail(message: str) -> None:
    sys.exit(f"error: {message}")


def read_manifest(bundle: Path) -> dict:
    place = bundle / "bundle.json"
    if not place.is_file():
        fail(f"BUNDLE={bundle}: has no bundle.json; it is no bundle, or was not finished. Make one with "
             "`python -m stages.bundle to=DIR`")  # fmt: skip
    try:
        manifest = json.loads(place.read_text(encoding="utf-8"))
    except ValueError:
        fail(f"{place}: is damaged; copy the bundle again")
    here = {"python": platform.python_version_tuple()[:2], "machine": platform.machine()}
    if tuple(manifest["python"].split(".")[:2]) != here["python"] or manifest["machine"] != here["machine"]:
        fail(f"BUNDLE={bundle}: is for Python {manifest['python']} on {manifest['machine']}, this is Python "
             f"{platform.python_version()} on {here['machine']}; name another interpreter with PYTHON=PATH")  # fmt: skip
    return manifest


def check(bundle: Path, files: dict) -> None:
    for name, known in files.items():
        path = bundle / name
        if not path.is_file():
            fail(f"{path}: is missing; copy the bundle again")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != known["sha256"]:
                fail(f"{path}: is damaged, its SHA-256 is another one; copy the bundle again")


def unpack(tar: Path, folder: Path) -> None:
    """Make a virtual environment of this machine's Python and put the packed packages into it.

    The file that says that it is whole comes last: without it, it is built again.
    """
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    with tarfile.open(tar) as packed:
        members = sorted(packed.getmembers(), key=lambda member: member.name == STATE)
        packed.extractall(folder, members, filter="fully_trusted")  # checked by its hash; environments have links
    for script in (folder / "bin").iterdir():
        if script.is_symlink() or not script.is_file():
            continue
        head, _, rest = script.read_bytes().partition(b"\n")
        if head.startswith(b"#!") and b"python" in head:  # the interpreter of the machine that packed it
            script.write_bytes(b"#!" + str(folder.absolute() / "bin" / "python").encode() + b"\n" + rest)


def main(bundle: Path, root: Path) -> None:
    manifest = read_manifest(bundle)
    check(bundle, manifest["files"])
    (root / ".venvs").mkdir(exist_ok=True)
    for name in manifest["files"]:
        if name.startswith("environments/"):
            of = Path(name).stem
            target = root / ".venv" if of == CORE else root / ".venvs" / of
            print(f"unpacking {target.relative_to(root)}", flush=True)
            unpack(bundle / name, target)
    if manifest["outputs"]:
        dvc = [str(root / ".venv" / "bin" / "python"), "-m", "dvc"]
        store = str((bundle / "store").absolute())
        print("fetching outputs from the bundle", flush=True)
        for arguments in (["remote", "add", "--local", "--force", "-q", "bundle", store],
                          ["pull", "--run-cache", "--allow-missing", "-q", "--remote", "bundle"]):  # fmt: skip
            if subprocess.run([*dvc, *arguments], cwd=root, check=False).returncode:
                fail(
                    f"BUNDLE={bundle}: its outputs were not fetched, see above; the environments are whole. Run it again"
                )
    (root / ".venv" / "ready").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]).expanduser().absolute(), Path(sys.argv[2]).absolute())
