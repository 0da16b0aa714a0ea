"""Uploads a variant's converted model with its card to the Hugging Face hub, or to a hub at HF_ENDPOINT.

A new repository is private. One commit holds the whole model, so a repository never has a part of one. What reached the
hub's storage before an interruption is not sent again. After the commit every file's hash at the hub is compared. The
token is that of HF_TOKEN or of `hf auth login`; it is in no message.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantline.checkpoints.model_files import CARD
from quantline.conversion.proof import PROOF_NAME
from quantline.core.errors import GateError, QuantlineError, UserError
from quantline.data import hub
from quantline.pipeline.identity import differing, file_hashes
from quantline.pipeline.records import VariantRecord, by_stage

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# The hub makes this file itself, with the repository.
_HUBS_OWN = (".gitattributes",)
_NAMED = 5
# As the hub allows them.
_REPO = re.compile(r"(?=.{1,96}$)\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)


class UploadError(QuantlineError):
    """The hub refused a file, or has another content than was sent."""


@dataclass(frozen=True)
class Upload:
    """What to upload.

    repo: owner/name. folder: the converted model. files: path below it -> SHA-256, as the convert stage recorded; nothing
    else is uploaded. card: the text of README.md. summary, description: of the commit. remedy: what makes changed files
    right again.
    """

    repo: str
    folder: Path
    files: Mapping[str, str]
    card: str
    summary: str
    description: str
    remedy: str


@dataclass(frozen=True)
class Uploaded:
    """The repository's address, the commit, whether the repository is new and private, the files and their bytes."""

    url: str
    commit: str
    created: bool
    private: bool
    files: int
    size: int


def check_gates(name: str, faults: Sequence[str], despite: Sequence[str]) -> None:
    """Refuse a variant that fails gates of promotion which are not named.

    Args:
        name: of the variant.
        faults: the gates that it fails, a sentence each that begins with the gate's name.
        despite: names of gates that may fail.

    Raises:
        UserError: `despite` names a gate that it does not fail.
        GateError: it fails another one.
    """
    failed = list(dict.fromkeys(fault.partition(":")[0].replace(" ", "_") for fault in faults))
    if idle := [gate for gate in despite if gate not in failed]:
        raise UserError(
            f"despite={','.join(despite)}: {name} does not fail {idle[0]}; it fails {', '.join(failed) or 'no gate'}"
        )
    if left := [gate for gate in failed if gate not in despite]:
        lines = "".join(f"\n  {fault}" for fault in faults if fault.partition(":")[0].replace(" ", "_") in left)
        raise GateError(
            f"{name} is not uploaded, it fails these gates of promotion:{lines}\n"
            f"to upload it all the same, with this in its card, name them: despite={','.join(failed)}"
        )


def check_repo(repo: str) -> None:
    """Refuse what is not a repository's name.

    Raises:
        UserError: it is not owner/name.
    """
    if not _REPO.fullmatch(repo) or re.search(r"--|\.\.|\.git$", repo):
        raise UserError(
            f"repo={hub.scrub(repo)}: give OWNER/NAME of letters, digits, '-', '_' and '.', such as me/tiny-gptq-w4"
        )


def upload_of(record: VariantRecord, repo: str, card: str, run_id: str | None) -> Upload:
    """What to upload of a variant.

    Args:
        record: of the variant.
        repo: owner/name.
        card: the text of its card.
        run_id: of its run in MLflow, if it has one.

    Raises:
        UserError: it has no converted model.
    """
    check_repo(repo)
    results = by_stage(record.results)
    if "convert" not in results:
        raise UserError(f"variant={record.name}: has no converted model to upload; run: {record.remedy('convert')}")
    # A card that a quantizer wrote is replaced by ours.
    files = {name: sha256 for name, sha256 in results["convert"]["outputs"].items() if name != CARD}
    run = f", MLflow run {run_id}" if run_id else ""
    description = f"Files: {results['convert']['output_hash']}. Code: {record.commit or 'not known'}."
    folder = record.outputs["convert"]
    summary = f"Quantline variant {record.name}{run}"
    return Upload(repo, folder, files, card, summary, description, record.restoring("convert"))


def upload(what: Upload, *, public: bool = False, replace: bool = False) -> Uploaded:
    """Upload a model, private if its repository is new and `public` is not set.

    Args:
        what: the model.
        public: the repository is to be public.
        replace: replace what a repository holds that was not uploaded from here, or that this model does not have.

    Raises:
        UserError: no token, no access, no network, a repository of another visibility or with other files.
        UploadError: the hub has other content than was sent.
    """
    check_repo(what.repo)
    found = {name: sha256 for name, sha256 in file_hashes(what.folder).items() if name != CARD}
    changed = differing(what.files, found)
    if changed:
        raise UserError(f"{what.folder / changed[0]}: differs from the convert stage's output; run: {what.remedy}")
    try:
        return _upload(_api(), what, public=public, replace=replace)
    except Exception as error:
        raise _explained(error, what.repo) from None  # the chained exceptions could show request headers


def _api() -> HfApi:
    from huggingface_hub import HfApi, get_token

    token = get_token()
    if not token:
        raise UserError("no token for the hub: set HF_TOKEN to a token with write access, or run `hf auth login`")
    return HfApi(endpoint=hub.endpoint(), token=token)


def _upload(api: HfApi, what: Upload, *, public: bool, replace: bool) -> Uploaded:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import RepositoryNotFoundError

    sent: dict[str, Path | bytes] = {name: what.folder / name for name in what.files}
    sent[CARD] = what.card.encode()
    try:
        found: Any = api.model_info(what.repo)
    except RepositoryNotFoundError:
        found = None
    stale: list[str] = []
    if found is not None:
        names = [file.rfilename for file in found.siblings or [] if file.rfilename not in _HUBS_OWN]
        _check_existing(what.repo, names, list(sent), private=bool(found.private), public=public, replace=replace)
        stale = sorted(set(names) - set(sent))
    else:
        api.create_repo(what.repo, private=not public)
    done = api.create_commit(
        what.repo,
        [
            *(CommitOperationAdd(name, content) for name, content in sent.items()),
            *(CommitOperationDelete(name) for name in stale),
        ],
        commit_message=what.summary, commit_description=what.description,
        parent_commit=found.sha if found is not None else None,
    )  # fmt: skip
    _verify(api, what.repo, str(done.oid), sent, what.files)
    size = sum(len(content) if isinstance(content, bytes) else content.stat().st_size for content in sent.values())
    return Uploaded(
        f"{hub.shown_endpoint()}/{what.repo}", str(done.oid), found is None, not public, len(sent), size
    )  # fmt: skip


def _check_existing(
    repo: str, held: Sequence[str], sent: Sequence[str], *, private: bool, public: bool, replace: bool
) -> None:
    where = f"{hub.shown_endpoint()}/{repo}"
    if private == public:
        is_now, wish = ("private", "leave public out") if private else ("public", "give public=true")
        raise UserError(f"{where} exists and is {is_now}: {wish}, change that in its settings, or give another repo")
    # Every conversion writes a proof, so a repository with one was uploaded from here.
    other = sorted(held) if PROOF_NAME not in held else sorted(set(held) - set(sent))
    if other and not replace:
        shown = ", ".join(other[:_NAMED]) + (f" and {len(other) - _NAMED} more" if len(other) > _NAMED else "")
        raise UserError(
            f"{where} exists with files that this upload would remove or replace ({shown}): give another repo, or "
            "replace=true, and its history still has them"
        )


def _verify(api: HfApi, repo: str, commit: str, sent: Mapping[str, Path | bytes], recorded: Mapping[str, str]) -> None:
    listed: Any = api.list_repo_tree(repo, recursive=True, revision=commit)
    held = {
        file.path: (file.lfs.sha256 if file.lfs else None, file.blob_id) for file in listed if hasattr(file, "blob_id")
    }
    for name, content in sent.items():
        sha256, blob = held.get(name, (None, None))
        body = content if isinstance(content, bytes) else None
        if sha256 is not None:
            same = sha256 == (hashlib.sha256(body).hexdigest() if body is not None else recorded[name])
        else:
            same = blob == _git_hash(body if body is not None else (Path(str(content))).read_bytes())
        if not same:
            raise UploadError(
                f"{name} of {repo} at commit {commit} is not what was sent; do not use it, upload it again"
            )


def _git_hash(content: bytes) -> str:
    """Git's name of a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _explained(error: Exception, repo: str) -> QuantlineError:
    if isinstance(error, QuantlineError):
        return error
    where = f"{hub.shown_endpoint()}/{repo}"
    for cause in hub.chain(error):
        if fact := _fact(cause, repo):
            return UserError(hub.scrub(f"{where}: {fact}"))
    line = " ".join(str(error).split())
    return UserError(hub.scrub(f"{where}: {type(error).__name__}: {line}; run again"))


def _fact(error: BaseException, repo: str) -> str | None:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    # The library for Xet storage gives the status in its text only.
    if xet := re.search(r"HTTP status \w+ error \((\d+).*/xet-write-token/", str(error)):
        status = int(xet[1])
        if status == 404:
            return "this hub has no Xet storage: set HF_HUB_DISABLE_XET=1 to send files over HTTP"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it to upload"
    if status == 401:
        return "the hub does not know the token (401): set HF_TOKEN to a valid one with write access"
    if status == 403:
        return f"the token may not write there (403): it needs write access to {repo.partition('/')[0]}"
    if status in (409, 412):
        return f"somebody else changed the repository meanwhile ({status}): look at it, then run again"
    return hub.transport_fact(error)
