"""Check every line of params.yaml, with shorter messages than DVC's and before anything runs: python -m stages.check"""

from __future__ import annotations

from stages import CONF, ROOT, command


def check(_arguments: dict[str, str | None]) -> int:
    from quantline.core.errors import UserError
    from quantline.pipeline.compose import frozen_variant, place_of, read_params, variant_overrides
    from quantline.pipeline.user_messages import explain

    faults = []
    params = ROOT / "params.yaml"
    names = list(read_params(params)["variants"])
    for name in names:
        variant_overrides(params, name)  # what is no line of overrides is told alone
    for name in names:
        try:
            frozen_variant(ROOT, name)
        except Exception as error:
            explained = explain(error, CONF)
            if explained is None:
                raise
            named = explained[0].startswith("params.yaml: ")
            faults.append(explained[0] if named else f"params.yaml: {place_of(name)}: {explained[0]}")
    if faults:
        raise UserError("\n".join(dict.fromkeys(faults)))
    return 0


if __name__ == "__main__":
    command(check, about=__doc__)
