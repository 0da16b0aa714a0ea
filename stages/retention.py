"""Remove unused objects from DVC's cache, and leftovers of removed variants from this checkout.

Objects of promoted variants are kept. Without apply=true, nothing is removed. See docs/guide/storage.md.

Examples:
    python -m stages.retention
    python -m stages.retention keep=branches apply=true
"""

from __future__ import annotations

from quantline.pipeline.command_line import Option
from stages import ROOT, command

SHOWN = 20
OPTIONS = [
    Option("keep", "workspace", "also keep what git's branches, tags or commits need",
           allowed=("workspace", "branches", "tags", "commits")),
    Option("remote", "NAME", "also clean this DVC remote"),
    Option("apply", "true", "remove the objects; otherwise only list them with their size", allowed=("false", "true")),
]  # fmt: skip


def retention(arguments: dict[str, str | None]) -> int:
    from quantline.lifecycle.promoted import promoted
    from quantline.lifecycle.retention import collect_garbage, former_outputs, remove_former, remove_partial
    from quantline.lifecycle.storage.dvc_lock import held

    apply = arguments["apply"] == "true"
    for line in remove_partial(ROOT):
        print(line)
    kept = promoted(ROOT)
    with held(ROOT):
        former = former_outputs(ROOT)
        garbage = collect_garbage(ROOT, kept, keep=str(arguments["keep"]), remote=arguments["remote"], apply=apply)
        if apply:
            remove_former(former)
    for place in former:
        print(f"  {place.relative_to(ROOT)}: of a variant that was removed from params.yaml")
    if garbage.objects:
        print("objects in DVC's cache that nothing needs, by their MD5:")
    for name in garbage.objects[:SHOWN]:
        print(f"  {name[:12]}  {garbage.described[name]}")
    if len(garbage.objects) > SHOWN:
        print(f"  and {len(garbage.objects) - SHOWN} more")
    what = (
        f"{len(garbage.objects)} objects, {garbage.bytes / 1e6:.1f} MB, and {len(former)} leftovers of removed variants"
    )
    print(f"removed {what}" if apply else f"would remove {what}; apply=true does it")
    print(f"kept for promoted variants: {garbage.protected} objects")
    return 0


if __name__ == "__main__":
    command(retention, OPTIONS, __doc__)
