"""Several jobs of one backend in one process, since imports are slow: {"backend": name, "jobs": {label: job}}.

A job may ask for `untranslated`: the toolchain then gets the model's own config.json.
"""

import importlib
from pathlib import Path

from quantline.toolchains.protocol import JobError, worker_main
from quantline.toolchains.workers.quantizers import model


def raw_links(model_dir, into):
    for path in Path(model_dir).resolve().iterdir():
        (into / path.name).symlink_to(path)
    return into


def run(job, report):
    backend = importlib.import_module(f"quantline.toolchains.workers.quantizers.{job['backend']}")
    translated, results = model.legacy_copy, {}
    for label, one in job["jobs"].items():
        model.legacy_copy = raw_links if one.pop("untranslated", False) else translated
        Path(one["output"]).mkdir(parents=True)
        try:
            results[label] = backend.run(one, report)
        except JobError as error:
            results[label] = {
                "refused": str(error),
                "left": sorted(path.name for path in Path(one["output"]).iterdir()),
            }
    return results


if __name__ == "__main__":
    worker_main(run)
