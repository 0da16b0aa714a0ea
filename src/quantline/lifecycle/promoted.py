"""What promoted variants need of DVC's cache: which objects, and bringing lost ones back from a remote.

dvc.lock has the outputs of the current variants alone, so `dvc pull` does not bring those of a variant that was promoted
and has changed since.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quantline.config.tracking import TrackingConfig
from quantline.core.errors import UserError
from quantline.lifecycle.storage import dvc_cache
from quantline.lifecycle.storage.dvc_outputs import bring, hashes_of, outputs_of
from quantline.lifecycle.tracking.reader import LOCK_FILE, artifact, connected, kept_tracking
from quantline.lifecycle.tracking.registry import Version, command_about, versions
from quantline.pipeline.paths import BY_HAND


@dataclass(frozen=True)
class Kept:
    """A promoted variant's outputs: DVC's hashes, sorted. demoting: the command that takes its alias, or its first one."""

    variant: str
    fingerprint: str
    outputs: tuple[str, ...]
    demoting: str


def promoted(root: Path) -> dict[str, str]:
    """The MD5s of the DVC objects that promoted variants need -> the command that demotes one; {} without a registry.

    Raises:
        UserError: what a promoted variant needs is not recorded whole.
        TrackingError: MLflow does not answer.
    """
    return {md5: kept.demoting for kept in promoted_outputs(root) for md5 in kept.outputs}


def promoted_outputs(root: Path, tracking: TrackingConfig | None = None) -> set[Kept]:
    """Outputs that garbage collection must keep, of each version with an alias.

    tracking: null is the store to which this checkout's pipeline publishes.

    Raises:
        UserError: a stage of such a variant has no output in DVC by its record, so what must be kept is not known.
        TrackingError: MLflow does not answer, so the aliases are unknown; nothing may be removed then.
    """
    tracking = tracking or TrackingConfig(enabled=True, uri=_kept_uri(root), experiment=None, timeout_seconds=10)
    held = [item for item in versions(tracking, root) if item.aliases]
    return {
        Kept(
            item.tags["quantline.variant"],
            item.tags["quantline.fingerprint"],
            _outputs(tracking, root, item),
            command_about("demote", item),
        )
        for item in held
    }


def _outputs(tracking: TrackingConfig, root: Path, item: Version) -> tuple[str, ...]:
    """DVC's hashes of a version's outputs, sorted: those of its promotion, and those that its run got since."""
    variant = item.tags["quantline.variant"]
    if variant.startswith(BY_HAND):
        return ()  # its files are in MLflow alone
    with connected(tracking, root) as client:
        stages = client.get_run(item.run_id).data.tags.get("quantline.stages", "").split()
        lock = yaml.safe_load(artifact(client, item.run_id, LOCK_FILE) or "") or {}
    if lost := [stage for stage in stages if not outputs_of(lock, stage)]:
        raise UserError(
            f"{item.model} version {item.version} ({variant}): was promoted without DVC's hashes of {', '.join(lost)}, "
            f"so what must be kept is not known; `{command_about('promote', item)}` again if it is still that variant, or "
            f"`{command_about('demote', item)}`"
        )
    return tuple(sorted({*item.tags.get("quantline.dvc", "").split(), *hashes_of(lock)}))


def _kept_uri(root: Path) -> str | None:
    uri = (kept_tracking(root) or {}).get("uri")
    return str(uri) if uri else None


def require_whole(repo: Any, cache: Path, kept: Mapping[str, str], remote: str | None = None) -> set[str]:
    """Check that the objects of promoted variants are in the cache; what is not is brought from a remote.

    Args:
        repo: DVC's, as `dvc_cache.opened` gives it.
        cache: its cache.
        kept: as `promoted` gives it.
        remote: name of the remote; null is DVC's default.

    Returns:
        MD5s of all objects that they need, with the files of folders.

    Raises:
        UserError: an object is missing or damaged, and no remote has it; there is no such remote.
    """
    faults: list[str] = []
    if any(_lost(cache, md5) for md5 in kept):
        faults = bring(repo, kept, remote)
    for md5, demoting in sorted(kept.items()):
        if lost := _lost(cache, md5):
            path = dvc_cache.object_path(cache, lost[0])
            known = "; ".join(faults) or "no remote has it"
            raise UserError(
                f"{path}: is missing or damaged, and a promoted variant needs it ({known}); put it back there, or let the "
                f"variant go: {demoting}"
            )
    return dvc_cache.objects_of(cache, kept)


def _lost(cache: Path, md5: str) -> list[str]:
    """The names of an object and of its files that are not there; itself where its list cannot be read."""
    entries = dvc_cache.entries_of(cache, "", md5)
    if entries is None:
        return [md5]
    return [
        name for name in (md5, *(entry.md5 for entry in entries)) if not dvc_cache.object_path(cache, name).is_file()
    ]
