"""Check every line of params.yaml before anything runs.

Each line is composed, and where its model is on this machine, also planned as `python -m stages.plan` does. A variant
that cannot be quantized is refused here, not after the float model has been served and scored.

Examples:
    python -m stages.check
"""

from __future__ import annotations

import sys

from stages import CONF, ROOT, command


def check(_arguments: dict[str, str | None]) -> int:
    from quantline.core.errors import UserError
    from quantline.pipeline.compose import frozen_variant, place_of, read_params, variant_overrides
    from quantline.pipeline.config import parse
    from quantline.pipeline.dvc_forms import refuse_other_form
    from quantline.pipeline.names import model_of
    from quantline.pipeline.own_files import missing_texts
    from quantline.pipeline.preflight import refuse_early
    from quantline.pipeline.user_messages import explain

    faults: list[str] = []
    notes: list[str] = []
    params = ROOT / "params.yaml"
    content = read_params(params)
    names = list(content["variants"])
    for name in names:
        variant_overrides(params, name)  # what is no line of overrides is told alone
    for name in names:
        try:
            config = parse(frozen_variant(ROOT, name))
            refuse_early(config, ROOT)
            # A text that is elsewhere is no fault: its results may be in DVC's cache.
            notes += [f"{_said(place_of(name), model_of(name))}: {text}" for text in missing_texts(ROOT, config)]
        except Exception as error:
            explained = explain(error, CONF)
            if explained is None:
                raise
            named = explained[0].startswith("params.yaml: ")
            faults.append(
                explained[0] if named else f"params.yaml: {_said(place_of(name), model_of(name))}: {explained[0]}"
            )
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))
    refuse_other_form(ROOT, content)
    for note in dict.fromkeys(notes):
        print(f"  note: {note}", file=sys.stderr)
    print(f"params.yaml: no fault in {', '.join(names)}", file=sys.stderr)
    return 0


def _said(place: str, model: str) -> str:
    return f"{place} with models.{model}" if model else place


if __name__ == "__main__":
    command(check, about=__doc__)
