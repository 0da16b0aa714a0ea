"""Show the lineage of a variant, stage by stage, or the first difference between two variants.

Each is the name of a variant of params.yaml, by-hand/NAME for a manual run, a folder of results, or an MLflow run by its
id, its fingerprint or a prefix of one.

Examples:
    python -m stages.lineage variant=awq-w4-g128
    python -m stages.lineage variant=awq-w4-g128 against=gptq-w4-g128
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantline.pipeline.command_line import Option
from stages import ROOT, main

OPTIONS = [
    Option(
        "variant",
        "NAME",
        "a variant of params.yaml, by-hand/NAME for a manual run, a folder of results, or an MLflow run",
        required=True,
    ),
    Option("against", "NAME", "another variant: print the first value in which the two differ"),
    Option("lineage.format", "json", "print JSON", allowed=("text", "json")),
]

if TYPE_CHECKING:
    from pathlib import Path

    from omegaconf import DictConfig

    from quantline.pipeline.lineage.chain import Lineage


def lineage(cfg: DictConfig, arguments: dict[str, str | None]) -> None:
    import json
    from dataclasses import asdict

    from quantline.pipeline.lineage.chain import as_values
    from quantline.pipeline.lineage.diff import first_difference
    from quantline.pipeline.lineage.report import as_text, difference_text

    as_json = arguments["lineage.format"] == "json"
    one = chain_of(cfg, str(arguments["variant"]), ROOT)
    if arguments["against"] is None:
        print(json.dumps(as_values(one), indent=2) if as_json else as_text(one))
        return
    other = chain_of(cfg, arguments["against"], ROOT)
    found = first_difference(one, other)
    values = {"one": one.name, "other": other.name, "difference": asdict(found) if found else None}
    print(json.dumps(values, indent=2) if as_json else difference_text(one, other, found))


def chain_of(cfg: DictConfig, given: str, root: Path) -> Lineage:
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig

    from quantline.pipeline.hydra_values import plain
    from quantline.pipeline.lineage.chain import folder_lineage, local_lineage, require_lineage
    from quantline.pipeline.paths import BY_HAND

    found = local_lineage(root, given)
    if found is None and not given.startswith(BY_HAND):
        found = folder_lineage(Path(given).expanduser().absolute(), root)
    if found is None and len(given) >= 6 and set(given) <= set("0123456789abcdef"):
        from quantline.lifecycle.tracking.reader import read_run, tracking_of

        tracking = tracking_of(plain(cfg), HydraConfig.get().overrides.task, root)
        found = read_run(tracking, root, given).chain
    return require_lineage(found, given, root)


if __name__ == "__main__":
    main(lineage, __file__, OPTIONS, __doc__, reads=("tracking",))
