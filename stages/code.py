"""Write code.yaml: for each stage one hash over the source files that influence its output. DVC watches these hashes.

Examples:
    python -m stages.code
"""

from __future__ import annotations

from stages import ROOT, command


def code(_arguments: dict[str, str | None]) -> int:
    from quantline.core.files import replaced
    from quantline.pipeline.code import CODE_FILE, stage_hash
    from quantline.pipeline.stages import PIPELINE

    lines = [f"{name}: {stage_hash(name)}\n" for name in ("compose", *PIPELINE, "fleet_smoke", "report")]
    with replaced(ROOT / CODE_FILE) as temporary:
        temporary.write_text("# Made by `python -m stages.code`.\n" + "".join(lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    command(code, about=__doc__)
