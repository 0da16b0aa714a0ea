"""Check params.yaml, with shorter messages than DVC's: python -m stages.check"""

from __future__ import annotations

from stages import ROOT, command


def check(_arguments: dict[str, str | None]) -> int:
    from quantline.pipeline.compose import read_params, variant_overrides

    params = ROOT / "params.yaml"
    for name in read_params(params)["variants"]:
        variant_overrides(params, name)
    return 0


if __name__ == "__main__":
    command(check, about=__doc__)
