"""Calibration data: texts are tokenized once, and every method and backend calibrates on exactly those token ids.

`sampling` chooses the documents and cuts them. This module reads, tokenizes and writes them.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantline.checkpoints.safetensors_file import SafetensorsFile, write_safetensors
from quantline.config.data import CalibrationConfig, SourceConfig
from quantline.core.errors import ConfigError, UserError
from quantline.core.files import building, sha256_of, write_json
from quantline.core.progress import Progress, bar
from quantline.data import hub, self_text
from quantline.data.documents import Document, format_of, read_documents
from quantline.data.sampling import MAX_DOCUMENTS, Quota, draw, shares
from quantline.data.self_text import TEXTS_NAME, Writer
from quantline.data.tokenizer import TextEncoder

TOKENS_NAME = "tokens.safetensors"
MANIFEST_NAME = "manifest.json"
HELD = "held_ids"
SELF = "self"  # the name in the manifest of what the float model wrote
_BATCH = 64  # documents tokenized at once: large enough for the tokenizer's threads, small enough to stop early


def tokens_sha256(input_ids: NDArray[np.int32]) -> str:
    """SHA-256 over ``"int32 <n>x<seq_len>\\n"`` and the ids' little-endian bytes."""
    digest = hashlib.sha256(f"int32 {'x'.join(map(str, input_ids.shape))}\n".encode())
    digest.update(np.ascontiguousarray(input_ids, dtype="<i4").tobytes())
    return digest.hexdigest()


def load(folder: Path) -> tuple[NDArray[np.int32], dict[str, Any]]:
    """The ids, int32 (n_samples, seq_len), and the manifest that `build` wrote.

    Raises:
        UserError: a file is missing, or the ids do not match the manifest.
    """
    path = folder / TOKENS_NAME
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        tokens: NDArray[np.int32] = SafetensorsFile.open(path).read("input_ids").astype(np.int32, copy=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: has no complete calibration data ({error}); run the stage calibrate again"
        ) from error
    if tokens_sha256(tokens) != manifest.get("input_ids_sha256"):
        raise UserError(f"{folder}: {TOKENS_NAME} does not match {MANIFEST_NAME}; run the stage calibrate again")
    return tokens, manifest


def build(model_dir: Path, spec: CalibrationConfig, out: Path, writer: Writer | None = None) -> dict[str, Any]:
    """Write `tokens.safetensors` (`input_ids`, int32, (n_samples, seq_len)) and `manifest.json` to `out`.

    What is held back lies beside them as `held_ids`, int32 (held, seq_len), where the text gives at least one more sample.

    Equal inputs give equal bytes: neither file contains a time or an absolute path. `out` appears complete or not at all.
    With `self_text` the float model writes the text where there is no source, or the hub does not give it; `texts.jsonl`
    keeps it.

    Args:
        model_dir: folder of the float model.
        spec: the text, and how it becomes samples.
        out: the folder to write.
        writer: lets the float model write; needed with `self_text`.

    Returns:
        the manifest, `seconds`, and `notes`, sentences for the user.

    Raises:
        ConfigError: sources without a file, all in one message.
        UserError: a source, a row or the tokenizer cannot be used, or there is too little text. Nothing is written.
    """
    started = time.perf_counter()
    _check(spec.sources)
    notes: list[str] = []
    written: list[str] = []
    encoder = TextEncoder.load(model_dir, chat=spec.chat_template)
    if encoder.max_length is not None and spec.seq_len > encoder.max_length:
        raise UserError(f"calibration.seq_len={spec.seq_len}: the model takes at most {encoder.max_length} tokens")
    if spec.self_text is not None and (unreached := _unreached(spec.sources)) is not None:
        if writer is None:
            raise UserError(f"calibration={spec.name}: the float model cannot write here; give calibration.path=FILE")
        ids, written, sources = _self_written(model_dir, encoder, spec, writer)
        tokens, held = ids[: spec.n_samples], ids[spec.n_samples :]
        separator = None
        if unreached:
            notes.append(f"calibration={spec.name}: the float model wrote the text itself, because {unreached}")
    else:
        tokens, held, sources, separator = _from_sources(model_dir, encoder, spec)
    manifest = {
        "schema": 1,
        "input_ids_sha256": tokens_sha256(tokens),
        "total_tokens": int(tokens.size),
        "held_back": len(held),
        "options": {**_options(spec), "max_documents": MAX_DOCUMENTS},
        "separator_id": separator,
        "tokenizer_sha256": encoder.sha256,
        "sources": sources,
    }
    with building(out) as folder:
        write_safetensors(folder / TOKENS_NAME, {"input_ids": tokens, **({HELD: held} if len(held) else {})})
        if written:
            (folder / TEXTS_NAME).write_text("".join(f"{line}\n" for line in written), encoding="utf-8")
        write_json(folder / MANIFEST_NAME, manifest)
    return {**manifest, "seconds": time.perf_counter() - started, "notes": notes}


def _options(spec: CalibrationConfig) -> dict[str, Any]:
    options = spec.model_dump(exclude={"name", "path", "sources"})
    return {key: value for key, value in options.items() if key != "self_text" or value is not None}


def _unreached(sources: Mapping[str, SourceConfig]) -> str | None:
    """Why the float model has to write the text: what the hub says, "" if there is no source. None if all are here."""
    for name, source in sources.items():
        if source.path is None:
            repo, file = _repo(name, source), str(source.file)
            try:
                if not hub.cached(repo, file):
                    hub.described(repo)  # asked once, while a download is tried again for half a minute
                hub.fetch_file(repo, file)
            except UserError as error:
                return str(error)
    return None if sources else ""


def _self_written(
    model_dir: Path, encoder: TextEncoder, spec: CalibrationConfig, writer: Writer
) -> tuple[NDArray[np.int32], list[str], dict[str, Any]]:
    assert spec.self_text is not None
    ids, written = self_text.write(
        model_dir,
        encoder,
        count=spec.n_samples + spec.held_back,
        length=spec.seq_len,
        seed=spec.seed,
        how=spec.self_text,
        writer=writer,
    )
    kinds = Counter(json.loads(line)["start"] for line in written)
    digest = hashlib.sha256("".join(f"{line}\n" for line in written).encode()).hexdigest()
    source = {"file": TEXTS_NAME, "file_sha256": digest, "samples": len(ids), "tokens": int(ids.size), "starts": kinds}
    return ids.astype(np.int32), written, {SELF: source}


def _from_sources(
    model_dir: Path, encoder: TextEncoder, spec: CalibrationConfig
) -> tuple[NDArray[np.int32], NDArray[np.int32], dict[str, Any], int | None]:
    """The samples, those that are held back, the sources' entries of the manifest, and the separator."""
    weights = {name: source.weight for name, source in spec.sources.items()}
    counts, further = shares(weights, spec.n_samples), shares(weights, spec.held_back)
    separator = None if spec.chat_template or spec.packing == "document" else encoder.separator
    quotas = [
        Quota(name, source, spec, counts[name], separator, held=further[name])
        for name, source in spec.sources.items()
        if counts[name]
    ]
    with bar("tokenizing") as progress:
        for quota in quotas:
            _fill(quota, encoder, progress, sum(len(other.samples) for other in quotas))
    samples = {(quota.name, index): row for quota in quotas for index, row in enumerate(quota.samples[: quota.wanted])}
    held = [row for quota in quotas for row in quota.samples[quota.wanted :]]
    order = sorted(samples, key=lambda sample: draw(spec.seed, "sample", *sample))
    ids = np.array([samples[sample] for sample in order], dtype=np.int64)
    if (top := max(max(row) for row in (*samples.values(), *held))) >= encoder.vocab_size:
        known = f"the model's vocabulary has {encoder.vocab_size}"
        raise UserError(f"{model_dir}: the tokenizer gives id {top}, but {known}; use the tokenizer of this model")
    kept = np.array(held, dtype=np.int32).reshape(-1, spec.seq_len)
    return ids.astype(np.int32), kept, {quota.name: quota.summary() for quota in quotas}, separator


def _check(sources: Mapping[str, SourceConfig]) -> None:
    faults = []
    for name, source in sources.items():
        if source.path is None and (source.repo is None or source.file is None):
            key = f"calibration.sources.{name}"
            remedy = "calibration.path=FILE" if len(sources) == 1 else f"{key}.path=FILE"
            faults.append(f"{key}: has neither a path nor a repo with a file; give {remedy}")
    if faults:
        raise ConfigError(faults)


def _repo(name: str, source: SourceConfig) -> hub.HubRepo:
    key = f"calibration.sources.{name}"
    return hub.HubRepo(str(source.repo), source.revision, "dataset", key, f"or give a local file with {key}.path=FILE")


def _locate(name: str, source: SourceConfig) -> tuple[Path, str, tuple[str, ...], dict[str, Any]]:
    """A source's file, format, text fields and origin (for the manifest)."""
    key = f"calibration.sources.{name}"
    if source.path is not None:
        path = Path(source.path).expanduser()
        if not path.is_file():
            fact = "is not a file" if path.exists() else "does not exist"
            looked = "" if path.is_absolute() else f" (looked in {Path.cwd()})"
            raise UserError(f"{key}.path={source.path}: {fact}{looked}; give an existing file")
        fields = (source.text_field, "text") if source.repo else (source.text_field,)
        origin: dict[str, Any] = {"file": path.name}
    else:
        path = hub.fetch_file(_repo(name, source), str(source.file))
        fields = (source.text_field,)
        origin = {"repo": source.repo, "revision": source.revision, "file": source.file}
    return (
        path,
        format_of(path, source.format),
        tuple(dict.fromkeys(fields)),
        {**origin, "file_sha256": sha256_of(path)},
    )


def _fill(quota: Quota, encoder: TextEncoder, progress: Progress, done: int) -> None:
    name, spec = quota.name, quota.spec
    path, format_name, fields, quota.origin = _locate(name, quota.source)
    documents: list[Document] = []
    empty: list[int] = []
    for document in islice(read_documents(path, format_name, fields), MAX_DOCUMENTS):
        quota.read += 1
        if document.empty:
            empty.append(document.line)
        else:
            documents.append(document)
    quota.empty = len(empty)
    if empty and not spec.skip_empty:
        lines = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
        remedy = "remove them or set calibration.skip_empty=true"
        raise UserError(f"{path}: {len(empty)} of {quota.read} rows are empty (lines {lines}); {remedy}")
    if not documents:
        raise UserError(f"{path}: has no text ({quota.read} rows, {quota.empty} of them empty); give a file with text")
    documents.sort(key=lambda document: draw(spec.seed, name, document.line))
    for start in range(0, len(documents), _BATCH):
        batch = documents[start : start + _BATCH]
        for document, ids in zip(batch, encoder.encode(batch, path), strict=True):
            quota.add(document, ids)
        progress.update(done + len(quota.samples), spec.n_samples + spec.held_back, name)
        if quota.full:
            return
    quota.add_later_pieces()
    if not quota.enough:
        raise quota.too_little(path)
