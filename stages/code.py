"""Write code.yaml: for each stage one hash over the source files that influence its output. DVC watches these hashes."""

from __future__ import annotations

from stages import ROOT


def code() -> None:
    from quantline.pipeline.code import CODE_FILE, stage_hash
    from quantline.pipeline.stages import PIPELINE

    lines = [f"{name}: {stage_hash(name)}\n" for name in (*PIPELINE, "report")]
    temporary = ROOT / f"{CODE_FILE}.tmp"
    temporary.write_text("# Made by `python -m stages.code`.\n" + "".join(lines), encoding="utf-8")
    temporary.replace(ROOT / CODE_FILE)


if __name__ == "__main__":
    code()
