"""Convert a quantized checkpoint, the pipeline's or one in a folder, to the layout that the serving target reads.

Examples:
    python -m stages.convert method=gptq bits=4
    python -m stages.convert source=auto source.path=downloads/model convert.target=compressed_tensors out=converted
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages import stage

if TYPE_CHECKING:
    from quantline.pipeline.run import StageRun


@stage("convert")
def convert(run: StageRun) -> None:
    from quantline.conversion.architecture import LABEL, MODULE
    from quantline.conversion.convert import convert as write_converted
    from quantline.pipeline.convert_folder import convert_folder, serving_target

    serving, notes = serving_target(run.config, run.root, run.device)
    run.warnings.extend(notes)
    if run.config.source.kind != "pipeline":
        convert_folder(run, serving)
        return
    run.refuse_float()
    source = run.input("quantize")
    with run.output() as out:
        proof = write_converted(
            source, out, run.config.convert, serving=serving,
            run_worker=lambda job: run.side_worker("reference", MODULE, job, LABEL),
        )  # fmt: skip
        run.metrics.update(proof.metrics)
        run.warnings.extend(proof.warnings)
        run.files.append("conversion_proof.json")


if __name__ == "__main__":
    convert()
