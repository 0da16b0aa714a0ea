"""Planned memory and disk of stages beside what they took: `python -m benchmarks.planned [FOLDER]`.

Goes through the results of a checkout, in artifacts/ and scratch/; FOLDER is another one than this. A row is a stage of a
variant: all of its processes on the host, as its monitor saw them, and its output on the disk, both in MB, planned /
measured and their ratio. Nothing is computed. Compare stages that this machine ran, each in a process of its own: by
`dvc repro` or `python -m stages.NAME`. Those of one `stages.run` share a process, which keeps what the stages before took.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.methods import ROOT
from quantline.core.errors import QuantlineError
from quantline.pipeline.compose import read_frozen
from quantline.pipeline.config import Config, parse
from quantline.pipeline.paths import PIPELINE_HOME, SAVED, read_result
from quantline.pipeline.preflight import machine_of, model_of, variant_spec
from quantline.pipeline.run import StageRun
from quantline.planning.preflight import check
from quantline.planning.stage_memory import Need, stage_needs


def variants(root: Path) -> Iterator[tuple[Path, Config]]:
    """The folders of a checkout's variants, each with its configuration."""
    for folder in sorted(path for path in (root / PIPELINE_HOME).glob("*") if path.is_dir()):
        saved = root / "variants" / f"{folder.name}.yaml"
        if saved.is_file():
            yield folder, parse(read_frozen(saved))
    for saved in sorted((root / "scratch").rglob(SAVED)):
        values = json.loads(saved.read_text(encoding="utf-8")).get("config")
        if values is not None and any(saved.parent.glob("*.json")):
            yield saved.parent, parse(values)


def needs(config: Config, root: Path) -> dict[str, Need]:
    """What the stages of a configuration should take, by name."""
    model, machine = model_of(StageRun("quantize", config, root, ())), machine_of(config, root)
    plan = check(variant_spec(config.model_dump()), model, machine)
    return {need.stage: need for need in stage_needs(plan, model, machine)}


def measured(result: dict[str, Any], output: Path) -> tuple[int, int]:
    """Bytes on the host and on the disk that a stage took."""
    host = result["monitor"].get("peak", {}).get("rss_bytes")
    return int(host or 0), sum(path.stat().st_size for path in output.rglob("*") if path.is_file())


def lines(root: Path) -> Iterator[str]:
    """The table."""
    yield f"{'stage':<12} {'of':<36} {'host, planned / measured':>30} {'disk, planned / measured':>30}"
    for folder, config in variants(root):
        try:
            planned = needs(config, root)
        except QuantlineError as error:
            yield f"{folder.relative_to(root)}: {error}"
            continue
        for stage, need in planned.items():
            path = folder / f"{stage}.json"
            if not path.is_file():
                path = folder.parent / "shared" / f"{stage}.json"
            if not path.is_file() or (stage == "download" and folder.name != "float"):
                continue
            result = read_result(path)
            if result["status"] != "ok":
                continue
            host, disk = measured(result, path.with_suffix(""))
            shown = [_beside(need.host, host), _beside(need.disk, disk) if need.disk else ""]
            yield f"{stage:<12} {folder.relative_to(root).as_posix()[-36:]:<36} {shown[0]:>30} {shown[1]:>30}"


def _beside(planned: int, taken: int) -> str:
    ratio = f"{planned / taken:.2f}" if taken else "-"
    return f"{planned / 1e6:,.0f} / {taken / 1e6:,.0f} = {ratio}"


def main() -> None:
    """See the module's description."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT, help="the checkout; this one by default")
    for line in lines(parser.parse_args().folder.resolve()):
        print(line)


if __name__ == "__main__":
    main()
