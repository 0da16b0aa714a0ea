"""Write inputs.yaml: one hash a stage over the options and files that it reads. DVC reruns what reads a changed one.

Examples:
    python -m stages.inputs
"""

from __future__ import annotations

from stages import ROOT, command


def inputs(_arguments: dict[str, str | None]) -> int:
    import yaml

    from quantline.core.errors import UserError
    from quantline.core.files import replaced
    from quantline.lifecycle.storage.linked import drop_damaged
    from quantline.pipeline.compose import read_params
    from quantline.pipeline.dvc_forms import refuse_other_form
    from quantline.pipeline.own_files import INPUTS_FILE
    from quantline.pipeline.variant_inputs import inputs_of_variants

    # Here, since this runs in each `dvc repro`: what DVC builds is what params.yaml names.
    refuse_other_form(ROOT, read_params(ROOT / "params.yaml"))
    if damaged := drop_damaged(ROOT):
        raise UserError(
            f"outputs were changed in place, and DVC's cache with them: {'; '.join(damaged)}. They are removed from the "
            "cache; run `dvc repro` again, which makes them anew"
        )
    text = yaml.safe_dump(inputs_of_variants(ROOT), allow_unicode=True, width=1000)
    with replaced(ROOT / INPUTS_FILE) as temporary:
        temporary.write_text("# Made by `python -m stages.inputs`.\n" + text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    command(inputs, about=__doc__)
