"""Tokenize the calibration text, or let the float model write it; every backend gets the same token ids.

Examples:
    python -m stages.calibrate model=demo
    python -m stages.calibrate model.path=models/mine calibration=jsonl calibration.path=chats.jsonl
    python -m stages.calibrate model.path=models/mine calibration=self
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages import stage

if TYPE_CHECKING:
    from quantline.pipeline.run import StageRun


@stage("calibrate")
def calibrate(run: StageRun) -> None:
    from quantline.data.calibration import build
    from quantline.data.self_text import TEXTS_NAME, Writer

    model = run.input("download") / "model"
    run.files += ["manifest.json"]
    with run.output() as out:
        report = build(
            model, run.config.calibration, out, Writer(run.worker, run.device, run.config.threads)
        )  # fmt: skip
        if (out / TEXTS_NAME).is_file():
            run.files.append(TEXTS_NAME)
        run.warnings += report["notes"]
        run.metrics.update(samples=run.config.calibration.n_samples, tokens=report["total_tokens"])


if __name__ == "__main__":
    calibrate()
