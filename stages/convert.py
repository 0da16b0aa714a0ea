"""Bring the quantized checkpoint into the layout that the serving target reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages import stage

if TYPE_CHECKING:
    from quantline.stage import StageRun


@stage("convert")
def convert(run: StageRun) -> None:
    from quantline.convert import convert as write_converted

    run.refuse_float()
    source = run.input("quantize")
    with run.output() as out:
        report = write_converted(source, out, run.config.convert.target)
        run.metrics.update(linears=report.linears, carried_tensors=report.carried)
        run.metrics.update(rewritten=int(report.source != report.target))


if __name__ == "__main__":
    convert()
