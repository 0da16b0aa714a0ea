"""Remove from DVC's cache what no variant needs any more, and from here what former variants left; what promoted variants
need stays in the cache:

python -m stages.retention [keep=workspace|branches|tags|commits] [remote=NAME] [apply=true]

Without apply=true it only lists what would go and how many bytes that is. See docs/guide/storage.md.
"""

from __future__ import annotations

from stages import ROOT

SHOWN = 20


def retention(words: dict[str, str | None]) -> int:
    from quantline.lifecycle.retention import collect_garbage, former_outputs, promoted, remove_former
    from quantline.pipeline.command_line import is_true

    apply = is_true("apply", words["apply"])
    kept = promoted(ROOT)
    former = former_outputs(ROOT)
    garbage = collect_garbage(ROOT, kept, keep=str(words["keep"]), remote=words["remote"], apply=apply)
    if apply:
        remove_former(former)
    for place in former:
        print(f"  {place.relative_to(ROOT)}: of a variant that params.yaml has no more")
    for name in garbage.objects[:SHOWN]:
        print(f"  {name}")
    if len(garbage.objects) > SHOWN:
        print(f"  and {len(garbage.objects) - SHOWN} more")
    what = (
        f"{len(garbage.objects)} objects, {garbage.bytes / 1e6:.1f} MB, and {len(former)} leftovers of former variants"
    )
    print(f"removed {what}" if apply else f"would remove {what}; apply=true does it")
    print(f"kept for promoted variants: {garbage.protected} objects")
    return 0


if __name__ == "__main__":
    from quantline.pipeline.command_line import run_words

    run_words(retention, __doc__, {"keep": "workspace", "remote": None, "apply": "false"})
