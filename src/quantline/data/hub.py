"""The Hugging Face hub or a mirror: pinned commits, verified files, and error messages with a remedy.

Files go to the hub's usual cache: by Xet where the hub has it (not with HF_HUB_DISABLE_XET=1), else over HTTP. There an
interrupted transfer resumes at the byte where it stopped. An interrupted run resumes with the missing files. HF_ENDPOINT
sets the endpoint, and HF_TOKEN (or `hf auth login`) the access token. The token is removed from every message.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from quantline.core.errors import UserError
from quantline.core.files import DISK_FULL, disk_full
from quantline.core.secrets import Scrubber

if TYPE_CHECKING:
    from huggingface_hub import HfApi

COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True)
class HubRepo:
    """A repository at a commit. For messages: `key` is the option that names it, `remedy` the alternative to the hub."""

    repo: str
    revision: str | None
    kind: str  # model or dataset
    key: str
    remedy: str

    @property
    def commit(self) -> str:
        """The pinned commit.

        Raises:
            UserError: the revision is missing or not a full commit hash. The message names the commit to pin if
                the hub answers.
        """
        if self.revision is not None and COMMIT.fullmatch(self.revision):
            return self.revision
        given = "is not set" if self.revision is None else f"{self.revision} is not a commit"
        try:
            now = _api().repo_info(
                self.repo, revision=self.revision, repo_type=self.kind, timeout=_TIMEOUT_SECONDS
            ).sha  # fmt: skip
        except Exception:  # this is only for the hint: the error below is raised in any case
            now = None
        pin = f"for its current state set {self.key}.revision={now}" if now else f"set {self.key}.revision to one"
        raise UserError(f"{self.key}.revision {given}: {scrub(self.repo)} needs a commit of 40 hex digits; {pin}")


def endpoint() -> str | None:
    """The hub's address from HF_ENDPOINT; None means the public hub."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def shown_endpoint() -> str:
    """The hub's address for messages, without credentials."""
    address = urlsplit(endpoint() or "https://huggingface.co")
    return f"{address.scheme}://{address.netloc.rpartition('@')[2]}"  # an address can carry a password


def _cache() -> str | None:
    home = os.environ.get("HF_HOME")
    return os.environ.get("HF_HUB_CACHE") or (str(Path(home) / "hub") if home else None)


def _api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint())


def scrub(text: str) -> str:
    """Remove credentials from `text`: those of this environment, and the token of `hf auth login`."""
    from huggingface_hub import get_token

    stored = None
    with suppress(Exception):  # no token is stored: nothing to hide
        stored = get_token()
    return Scrubber(also=[stored])(text)


def fetch_snapshot(source: HubRepo, allow: Sequence[str], ignore: Sequence[str]) -> Path:
    """Download the files that match `allow` but not `ignore`; return the commit's folder in the cache.

    Raises:
        UserError: no such repository or commit, no access, no network, a broken transfer, a full disk.
    """
    from huggingface_hub import snapshot_download

    commit = source.commit
    try:
        return Path(
            snapshot_download(
                source.repo, revision=commit, repo_type=source.kind, endpoint=endpoint(), cache_dir=_cache(),
                allow_patterns=list(allow), ignore_patterns=list(ignore),
            )
        )  # fmt: skip
    except Exception as error:
        raise _explained(error, source) from None  # the chained exceptions could show request headers


def fetch_file(source: HubRepo, file: str) -> Path:
    """Download one file, check it, and return its path in the cache.

    Raises:
        UserError: as for `fetch_snapshot`; or the file is not in the repository, or is damaged.
    """
    from huggingface_hub import hf_hub_download

    commit = source.commit
    try:
        path = Path(
            hf_hub_download(
                source.repo, file, revision=commit, repo_type=source.kind, endpoint=endpoint(), cache_dir=_cache()
            )
        )
    except Exception as error:
        raise _explained(error, source, file) from None
    hash_checked(path, f"{source.repo}: {file}")
    return path


def cached(source: HubRepo, file: str) -> bool:
    """Whether a file lies in the cache already, so that no network is needed."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(
        source.repo, file, revision=source.commit, repo_type=source.kind, cache_dir=_cache()
    )  # fmt: skip
    return isinstance(found, str)


def safetensors_header(source: HubRepo, file: str) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file, read by range requests: tensor -> dtype, shape, data_offsets; without its metadata.

    Raises:
        UserError: as for `fetch_snapshot`, or the file has no valid header.
    """
    commit = source.commit
    try:
        found = _api().parse_safetensors_file_metadata(source.repo, file, repo_type=source.kind, revision=commit)
    except Exception as error:
        raise _explained(error, source, file) from None
    return {
        name: {"dtype": str(info.dtype), "shape": list(info.shape), "data_offsets": list(info.data_offsets)}
        for name, info in found.tensors.items()
    }


def described(source: HubRepo) -> tuple[str, list[str]]:
    """The commit that the revision, or the main branch, is now, and the names of its files; asked once, without retries.

    Raises:
        UserError: as for `fetch_snapshot`.
    """
    try:
        found = _api().repo_info(source.repo, revision=source.revision, repo_type=source.kind, timeout=_TIMEOUT_SECONDS)
    except Exception as error:
        raise _explained(error, source) from None
    return str(found.sha), [sibling.rfilename for sibling in getattr(found, "siblings", None) or []]


def list_files(source: HubRepo) -> list[str] | None:
    """Names of all files of a repository; None if the hub does not answer, so that they are not known."""
    try:
        return described(source)[1]
    except UserError:  # without it more is asked for, and a message says less
        return None


def card_data(repo: str, revision: str | None) -> dict[str, Any]:
    """The YAML header of a model's card; empty if it has none, or the hub does not answer."""
    try:
        found: Any = _api().model_info(repo, revision=revision, timeout=_TIMEOUT_SECONDS).card_data
    except Exception:  # a model is described without it
        return {}
    return dict(found.to_dict()) if found is not None else {}


def hash_checked(path: Path, label: str) -> str:
    """SHA-256 of a cached file, after comparing its content with the hub's hash.

    The cache names a file's content by the hub's own hash: SHA-256 for large files, git's SHA-1 for others. A damaged
    one is removed from the cache, so that the next run fetches it again.

    Raises:
        UserError: the content differs from the hub's.
    """
    blob = Path(path.parent, os.readlink(path)) if path.is_symlink() else path
    size = path.stat().st_size
    sha256 = hashlib.sha256()
    git = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    hashes = {64: (sha256,), 40: (sha256, git)}.get(len(blob.name), (sha256,))
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            for digest in hashes:
                digest.update(chunk)
    expected = blob.name if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name) and path.is_symlink() else None
    actual = git.hexdigest() if expected and len(expected) == 40 else sha256.hexdigest()
    if expected and expected != actual:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise UserError(
            f"{label}: the cached file is damaged: {size} bytes with hash {actual}, but the hub's hash is {expected}; "
            "it was removed from the cache, run again to fetch it again"
        )
    return sha256.hexdigest()


def chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and those that caused it, the outermost first."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def _explained(error: Exception, source: HubRepo, file: str | None = None) -> UserError:
    if isinstance(error, UserError):
        return error
    what = f"{source.kind} {source.repo} at {source.revision}" + (f", file {file}" if file else "")
    for cause in chain(error):
        if isinstance(cause, OSError) and cause.errno in DISK_FULL:
            return disk_full(Path(cause.filename or _cache() or Path.home()).parent)
        fact = _fact(cause, source)
        if fact:
            return UserError(scrub(f"{what}: {fact}; {source.remedy}"))
    line = next(iter(str(error).strip().splitlines()), "")
    return UserError(scrub(f"{what}: {type(error).__name__}: {line}; run again, or {source.remedy}"))


def _fact(error: BaseException, source: HubRepo) -> str | None:
    from huggingface_hub import errors

    where = shown_endpoint()
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    facts: tuple[tuple[type[BaseException], str], ...] = (
        (errors.GatedRepoError, f"is gated: accept its licence at {where}/{source.repo} and set HF_TOKEN"),
        (
            errors.RepositoryNotFoundError,
            f"is not at {where}, or is private: check {source.key}.repo or set HF_TOKEN",
        ),
        (errors.RevisionNotFoundError, f"{where} has no such commit: check {source.key}.revision"),
        (errors.RemoteEntryNotFoundError, f"{where} has no such file: check {source.key}.file"),
        (errors.HFValidationError, f"is not a repository name; give {source.key}.repo as owner/name"),
        (errors.OfflineModeIsEnabled, "is not in the cache and HF_HUB_OFFLINE is set: unset it"),
    )
    for kind, known in facts:
        if isinstance(error, kind):
            return known
    if status in (401, 403):
        return f"{where} refuses access ({status}): set HF_TOKEN to a token with read access"
    if fact := transport_fact(error):
        return fact
    if "Consistency check failed" in str(error):
        sizes = re.search(r"of size (\d+) but has size (\d+) \((.*)\)", str(error))
        if sizes:
            expected, actual, name = sizes.groups()
            return f"the transfer of {name} ended at {actual} of {expected} bytes: run again"
    return None


def transport_fact(error: BaseException) -> str | None:
    """What a failed request says of the hub or the network, with the remedy; None if it is something else."""
    where = shown_endpoint()
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return f"{where} answered with HTTP status {status}: try again later"
    if isinstance(error, RuntimeError) and "CAS" in str(error):  # of hf_xet, whose errors have no type of their own
        return _xet_fact(str(error))
    network = any(kind.__name__ == "TransportError" for kind in type(error).__mro__)
    if network and type(error).__name__ in ("RemoteProtocolError", "ReadError", "ReadTimeout"):
        return f"the transfer from {where} was interrupted ({type(error).__name__}): run again"
    if network or isinstance(error, (ConnectionError, TimeoutError)):
        return f"{where} cannot be reached ({type(error).__name__}): check the network, set HF_ENDPOINT to a mirror"
    return None


def _xet_fact(said: str) -> str:
    """What hf_xet said, without the address of the pack, which may be signed."""
    place = re.search(r"https?://[^/\s?]+", said)
    status = re.search(r"\((\d{3} [^)]*)\)", said)
    where = f" at {place[0]}" if place else ""
    return (
        f"the transfer from Xet storage{where} failed ({status[1] if status else 'no answer'}): run again, or set "
        "HF_HUB_DISABLE_XET=1, which transfers over HTTP"
    )
