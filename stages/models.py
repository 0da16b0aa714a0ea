"""Bring dvc.yaml into the form for the models of params.yaml: for one, or for each line of `models:`.

Run it when `models:` comes or goes, or when `pairs:` changes; `dvc repro` says so. All else in dvc.yaml stays. See
docs/guide/models.md.

Examples:
    python -m stages.models
"""

from __future__ import annotations

from stages import ROOT, command


def models(_arguments: dict[str, str | None]) -> int:
    from quantline.pipeline.compose import read_params
    from quantline.pipeline.dvc_forms import rewrite
    from quantline.pipeline.names import is_baseline_name

    content = read_params(ROOT / "params.yaml")
    changed = rewrite(ROOT, content)
    variants = [name for name in content["variants"] if not is_baseline_name(name)]
    names = list(content.get("models") or ())
    one, several = (
        f"one model, {len(variants)} variants",
        f"{len(names)} models ({', '.join(names)}), {len(variants)} pairs",
    )
    what = several if names else one
    print(f"dvc.yaml: {'now for' if changed else 'is already for'} {what}")
    return 0


if __name__ == "__main__":
    command(models, about=__doc__)
