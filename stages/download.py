"""Download the float model, check every file, and record its logits on a fixed probe.

Examples:
    python -m stages.download model.path=models/mine
    python -m stages.download model.repo=OWNER/NAME model.revision=COMMIT
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages import stage

if TYPE_CHECKING:
    from quantline.pipeline.run import StageRun


@stage("download")
def download(run: StageRun) -> None:
    from quantline.core.errors import naming
    from quantline.data.download import check_contents, fetch, label_of
    from quantline.data.parity_probe import record_probe
    from quantline.pipeline.fit import refuse_what_does_not_fit

    with run.output() as out, naming(out / "model", label_of(run.config.model), ": "):
        report = fetch(run.config.model, out / "model")
        if report["weights"] == "pickle":
            run.worker(
                "reference",
                "quantline.toolchains.workers.reference.unpickle",
                {"folder": str(out / "model")},
                "pickles to safetensors",
            )
        if run.frozen:  # before anything is computed; by hand, each stage looks at what it reads
            refuse_what_does_not_fit(run.config, out / "model")
        check_contents(out / "model")
        run.metrics.update(size_bytes=report["bytes"], files=len(report["files"]))
        run.metrics.update(record_probe(run.worker, out / "model", out / "probe.safetensors"))


if __name__ == "__main__":
    download()
