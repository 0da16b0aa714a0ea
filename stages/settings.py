"""Compare two settings of the server of one variant.

The variant is served as it is and with the given options of `serve`, and both are measured in turns, as `speed` does.

Examples:
    python -m stages.settings variant=awq-w4-g128 serve.process.max_num_seqs=1
    python -m stages.settings variant=awq-w4-g128 serve.process.cpu_offload_gib=4
"""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING

from quantline.pipeline.command_line import Option
from stages import ROOT, main

OPTIONS = [
    Option("folder", "DIR", "the folder of any checkpoint; `folder=` may be left out", bare=True),
    Option("variant", "NAME", "a variant of params.yaml, float for the float model, or by-hand/NAME for a manual run"),
    Option("alias", "production", "a promoted variant, fetched and verified"),
    Option("model", "NAME", "the registered model, where several have the alias"),
]

if TYPE_CHECKING:
    from omegaconf import DictConfig


def settings(cfg: DictConfig, arguments: dict[str, str | None]) -> None:
    from hydra.core.hydra_config import HydraConfig

    from quantline.core.files import building, write_json
    from quantline.evaluation.speed import trust
    from quantline.evaluation.speed.run import measure
    from quantline.evaluation.speed.settings import relabelled, render
    from quantline.lifecycle import serve as serving
    from quantline.pipeline.hydra_values import plain
    from quantline.pipeline.run import StageRun
    from quantline.pipeline.server import server_of

    typed = serving.Typed(plain(cfg), HydraConfig.get().overrides.task)
    pair, plan = serving.settings_of(ROOT, arguments, typed)
    run = StageRun("speed", pair[1].config, ROOT, tuple(typed.overrides))
    vllm = server_of(run)
    subjects = serving.measured_settings(pair, vllm.version, run.device)
    where = ROOT / serving.HOME / f"settings-{pair[1].name.replace('/', '-')}"
    with building(where) as out:
        measured = measure(
            python=vllm.python, version=vllm.version, subjects=subjects, plan=plan, out=out, log=where.with_suffix(".log"),
            bench=partial(run.worker, "vllm", "quantline.toolchains.workers.vllm_bench", log=where.with_suffix(".log")),
            as_given=True,
        )  # fmt: skip
        document = relabelled(measured.document)
        write_json(out / "speed.json", document)
    print(f"{pair[1].name} as it is, and with {' '.join(serving.serve_overrides(typed))}")
    print(render(document))
    for note in trust.notes(document):
        print(f"  note: {note}", file=sys.stderr)
    print(f"-> {where.relative_to(ROOT)}/speed.json", file=sys.stderr)


if __name__ == "__main__":
    main(settings, __file__, OPTIONS, __doc__, reads=("serve", "speed", "device", "toolchains", "tracking"))
